"""Trains a small model on Transformer Engine's layers by several gloo ranks, and on local layers in
one process, and prints how far they are from each other, as JSON. ``test_rank_numbers`` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.convert.models import GEMMA2, GPT_OSS
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve, whole_weights
from tests.te.numbers import configure, is_compared

STEPS = 3
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A layout of a model.

    Args:
        ranks: that share it.
        layout: settings of Transformer Engine's run alone.
        model: settings of both runs, as of ``configure``.
        samples: of a pack; the second half of a pack of one is padding.
    """

    ranks: int = 2
    layout: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 6


TP2 = dict(tensor_model_parallel_size=2)
SP = TP2 | dict(sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)
RUNS = {
    "TP2": Run(layout=TP2),
    "TP2 with SP": Run(layout=SP),
    "TP2 with SP, replicated vision encoder": Run(layout=SP | dict(vision="data")),
    "TP2 with SP, recompute full": Run(layout=SP | dict(recompute="full")),
    "TP2 with SP, recompute selective": Run(layout=SP | dict(recompute="selective")),
    "TP2 with SP, connector": Run(layout=SP, model=dict(trainable=("connector",))),
    "TP2 with SP, query and key norms": Run(layout=SP, model=dict(qk_norm=True)),
    "TP2 with SP, cross-attention": Run(layout=SP, model=dict(crosses=True)),
    "TP2 with SP, adapters": Run(
        layout=SP, model=dict(adapters=True, trainable=("connector", "language.*.lora"))
    ),
    "PP2, dropout of adapters, recompute full": Run(
        layout=PP2 | dict(layout="v*2|v,c,t*3,h", recompute="full"),
        model=dict(adapters=True, dropout=0.3, trainable=("connector", "*.lora")),
    ),
    "TP2 with SP, adapters on 4 bits": Run(
        layout=SP,
        model=dict(adapters=True, nf4=("vision", "language"), trainable=("connector", "*.lora")),
    ),
    "PP2": Run(layout=PP2 | dict(layout="v*3,c,t|t*2,h")),
    "PP2, interleaved": Run(
        layout=PP2 | dict(virtual_pipeline_model_parallel_size=2, layout="v|v*2|c,t|t*2,h")
    ),
    "PP2, boundary in the vision encoder": Run(layout=PP2 | dict(layout="v*2|v,c,t*3,h")),
    "TP2 with SP, Gemma 2": Run(layout=SP, model=dict(language=GEMMA2)),
    "CP2, Gemma 2": Run(layout=CP2, model=dict(language=GEMMA2)),
    "EP2, GPT-OSS": Run(layout=EP2, model=dict(language=GPT_OSS | dict(num_experts=6))),
    "TP2 with SP, GPT-OSS, a rank with nothing but padding": Run(
        layout=SP | dict(expert_tensor_parallel_size=1), model=dict(language=GPT_OSS), samples=1
    ),
    "DP2": Run(layout={}),
    "CP2": Run(layout=CP2),
    "CP4": Run(ranks=4, layout=CP2 | dict(context_parallel_size=4)),
    "CP2, all tokens in the head": Run(layout=CP2, model=dict(head_tokens="all")),
    "CP2, recompute full": Run(layout=CP2 | dict(recompute="full")),
    "CP2, cross-attention": Run(layout=CP2, model=dict(crosses=True)),
    "TP2 with SP, Qwen2.5-VL": Run(layout=SP, model=dict(native="Qwen2.5-VL")),
    "TP2 x CP2, Qwen2.5-VL, replicated vision encoder": Run(
        ranks=4, layout=TP2 | CP2 | dict(vision="data"), model=dict(native="Qwen2.5-VL")
    ),
    "CP2, Qwen3-VL": Run(layout=CP2, model=dict(native="Qwen3-VL")),
    "TP2 x PP2 with SP, Qwen3-VL": Run(
        ranks=4,
        layout=SP | PP2 | dict(layout="v*2|v,c,t*3,h"),
        model=dict(native="Qwen3-VL"),
    ),
    "TP2 x CP2 with SP": Run(ranks=4, layout=SP | CP2),
    "TP2 x PP2 with SP": Run(ranks=4, layout=SP | PP2 | dict(layout="v*2|v,c,t*3,h")),
    "EP2": Run(layout=EP2, model=dict(experts=6)),
    "TP2 x EP2 with SP": Run(
        ranks=4, layout=SP | EP2 | dict(expert_tensor_parallel_size=1), model=dict(experts=6)
    ),
    "EP2, all-gather": Run(layout=EP2, model=dict(experts=6, dispatcher="allgather")),
    "ETP2": Run(layout=SP | dict(expert_tensor_parallel_size=2), model=dict(experts=6)),
}


@cache
def install() -> None:
    """Put stand-ins into this rank, once."""
    from tests.te import torch_kernels

    torch_kernels.install()


def train(config: Any) -> Curve:
    """Train in this rank."""
    install()
    return train_curve(config)


@cache
def packs(features_per_tile: int, samples: int) -> Path:
    """Make packs once; of images of any size if a tile has no features."""
    from tests.te.numbers import make_native_packs, make_packs

    if not features_per_tile:
        return make_native_packs(ALIGNMENT)
    return make_packs(features_per_tile, ALIGNMENT, samples)


def compare(pool: Pool, name: str) -> dict[str, Any]:
    """Train by one process and in the layout of this name."""
    from tests.gpu.models import SMALL

    row = RUNS[name]
    features = {"crosses": 1, "native": 0}
    kind = next((one for one in features if one in row.model), "")
    folder = packs(features.get(kind, SMALL.features_per_tile), row.samples)
    alone = configure(folder, "local", steps=STEPS, **row.model)
    engine = configure(folder, "transformer_engine", steps=STEPS, **row.model, **row.layout)
    (expected,) = pool.run(train, 1, alone)
    curves = pool.run(train, row.ranks, engine)
    expected_weights = whole_weights([expected])
    weights = whole_weights(curves)
    distances = [
        float(np.linalg.norm(weights[key] - one) / max(np.linalg.norm(one), 1e-12))
        for key, one in expected_weights.items()
        if is_compared(key)
    ]
    return {
        "same_keys": weights.keys() == expected_weights.keys(),
        "alone": list(zip(expected.losses, expected.grad_norms, strict=True)),
        "ranks": [list(zip(one.losses, one.grad_norms, strict=True)) for one in curves],
        "farthest": max(distances),
    }


def main() -> None:
    """Compare every layout and print what was found."""
    pool = Pool()
    found = {}
    for name in sys.argv[2:] or RUNS:
        try:
            found[name] = compare(pool, name)
        except AssertionError as error:
            found[name] = {"error": str(error)[-6000:]}
    pool.close()
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
