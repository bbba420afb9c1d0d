"""Trains a small model on Transformer Engine's layers and on local ones, on a CPU, lets both answer
questions, and prints how far they are from each other, as JSON. ``test_numbers`` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.config.lora import Lora
from tests.convert.models import EXPERTS, GEMMA2, GPT_OSS
from tests.ranks.pool import models_in_memory
from tests.te import torch_kernels
from tests.te.build import mixture

SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {},
    "all tokens in the head": dict(head_tokens="all"),
    "drop path": dict(drop_path=0.3),
    "recompute full": dict(recompute="full", drop_path=0.3),
    "recompute selective": dict(recompute="selective"),
    "connector": dict(trainable=("connector",)),
    "a late layer": dict(trainable=("vision.encoder.layers.2",), recompute="full"),
    "vision": dict(trainable=("vision", "connector"), drop_path=0.3),
    "query and key norms": dict(qk_norm=True),
    "biases, recompute selective": dict(biases=True, recompute="selective"),
    "cross-attention": dict(crosses=True),
    "cross-attention, recompute full": dict(crosses=True, recompute="full"),
    "experts": dict(experts=5),
    "experts, recompute selective": dict(experts=5, recompute="selective"),
    "all options of routers": dict(experts=5, options=True),
    "routers alone": dict(experts=5, trainable=("language.*.router",)),
    "experts with GeGLU": dict(language=EXPERTS | dict(num_experts=7, activation="geglu_tanh")),
    "Gemma 2": dict(language=GEMMA2),
    "Gemma 2, recompute full": dict(language=GEMMA2, recompute="full"),
    "Gemma 2, recompute selective": dict(language=GEMMA2, recompute="selective"),
    "GPT-OSS": dict(language=GPT_OSS),
    "GPT-OSS, recompute full": dict(language=GPT_OSS, recompute="full"),
    "GPT-OSS, recompute selective": dict(language=GPT_OSS, recompute="selective"),
    "GPT-OSS, routers and biases behind experts": dict(
        language=GPT_OSS, trainable=("language.*.router", "language.*.experts.*.linear_fc2.bias")
    ),
    "Qwen2.5-VL": dict(native="Qwen2.5-VL"),
    "Qwen2.5-VL, recompute full": dict(native="Qwen2.5-VL", recompute="full"),
    "Qwen2.5-VL, vision": dict(native="Qwen2.5-VL", trainable=("vision", "connector")),
    "Qwen3-VL": dict(native="Qwen3-VL"),
    "Qwen3-VL, recompute full": dict(native="Qwen3-VL", recompute="full"),
    "Qwen3-VL, recompute selective": dict(native="Qwen3-VL", recompute="selective"),
    "adapters on 4 bits": dict(
        adapters=True, nf4=("vision", "language"), trainable=("connector", "*.lora")
    ),
    "adapters on 4 bits, recompute full": dict(
        adapters=True,
        nf4=("language.*.mlp",),
        trainable=("connector", "*.lora"),
        recompute="full",
    ),
    "adapters on 4 bits beside experts": dict(
        experts=5,
        adapters=True,
        nf4=("language.*.self_attention",),
        trainable=("connector", "language.*.lora"),
    ),
    "adapters of experts": dict(
        experts=5, adapters=True, trainable=("connector", "language.*.lora")
    ),
}
STEPS = 2
PACKS = 4
NEW_TOKENS = 4


def make_packs(features_per_tile: int, alignment: int = 1, samples: int = 6) -> Path:
    """Write packs of so many random samples for the small model, with so many placeholders of a
    tile.
    """
    from tests.data.samples import make_dataset
    from tests.gpu.models import CAPACITY, SMALL

    folder = Path(tempfile.mkdtemp()) / "train"
    make_dataset(
        folder,
        packs=8,
        samples_per_pack=samples,
        image_share=0.6,
        capacity=CAPACITY,
        text_tokens=(30, 120),
        context_token_id=7,
        tile_size=SMALL.vision.image_size,
        features_per_tile=features_per_tile,
        vocab_size=SMALL.language.vocab_size,
        alignment=alignment,
    )
    return folder


def make_native_packs(alignment: int = 1) -> Path:
    """Write packs of images of any size, and videos, for the small models that read them."""
    from tests.data.native_packs import Clip, write_native
    from tests.gpu.models import CAPACITY, NATIVE

    folder = Path(tempfile.mkdtemp()) / "train"
    model = NATIVE["Qwen3-VL"]
    clip = Clip(size=(48, 33), frames=5)
    shown = [((120, 90),), (), ((50, 200), (16, 16)), (clip, (33, 70))]
    write_native(
        folder,
        shown * 8,
        per_pack=4,
        capacity=CAPACITY,
        alignment=alignment,
        tile_size=model.vision.image_size,
        vocab_size=model.language.vocab_size,
        context_token_id=7,
    )
    return folder


def configure(
    folder: Path,
    kernels: str,
    native: str = "",
    qk_norm: bool = False,
    biases: bool = False,
    crosses: bool = False,
    language: Mapping[str, Any] | None = None,
    experts: int = 0,
    options: bool = False,
    dispatcher: str = "alltoall",
    adapters: bool = False,
    dropout: float = 0.0,
    nf4: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """Return a run in float32; Adam's eps is large, so that it does not blow up the last bits."""
    from tests.gpu.models import NATIVE, small

    config = small(folder, precision="float32", lr=1e-3, adam_eps=1e-3, kernels=kernels, **settings)
    if native:
        return dataclasses.replace(config, architecture=NATIVE[native])
    if language:
        changed = dataclasses.replace(config.architecture.language, **language)
        model = dataclasses.replace(config.architecture, language=changed)
        return dataclasses.replace(config, architecture=model)
    if crosses:
        return dataclasses.replace(config, architecture=crossed(config.architecture))
    if experts:
        model = mixture(config.architecture, experts, has_options=options)
        # The first expert of each layer has none.
        targets = ("language.*.experts.[1-9].*",)
        targets = ("language.*.self_attention",) if nf4 else targets
        lora = Lora(rank=4, targets=targets, nf4=nf4) if adapters else Lora()
        model = dataclasses.replace(model, lora=lora)
        sending = dataclasses.replace(config.experts, dispatcher=dispatcher)
        return dataclasses.replace(config, architecture=model, experts=sending)
    if adapters:
        lora = Lora(rank=4, targets=("vision", "language"), dropout=dropout, nf4=nf4)
        model = dataclasses.replace(config.architecture, lora=lora)
        return dataclasses.replace(config, architecture=model)
    if not (qk_norm or biases):
        return config
    changes = dict(family="qwen3", qkv_bias=False, tied_head=True)
    if biases:
        changes = dict(family="persimmon", activation="relu2", layernorm_epsilon=1e-5)
    language = dataclasses.replace(config.architecture.language, qk_norm=qk_norm, **changes)
    return dataclasses.replace(
        config, architecture=dataclasses.replace(config.architecture, language=language)
    )


def crossed(architecture: Any) -> Any:
    """Read images by gated cross-attention, whose gates are open, behind a resampler."""
    from megavlm.config.connectors import Connector
    from megavlm.config.cross_attention import CrossAttention
    from megavlm.config.resampler import Resampler

    resampler = Resampler(latents=4, num_layers=1, num_attention_heads=2, head_size=16)
    return dataclasses.replace(
        architecture,
        connector=Connector(kind="resampler", resampler=resampler),
        cross_attention=CrossAttention(every=2, gate_start=0.5, gate="vector"),
        added_tokens=2,
    )


def train(config: Any) -> tuple[list[tuple[float, float]], dict[str, Any], list[list[int]]]:
    """Return loss and gradient norm of each step, and in the end weights and answers."""
    from megavlm.model.weights import named_weights
    from megavlm.parallel import process_groups
    from megavlm.train.evaluate import evaluating
    from megavlm.train.generate import generate
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates, whole_weights
    from megavlm.train.step import train_step
    from tests.data.questions import random_questions
    from tests.ranks.runs import build

    job = build(config)
    packs = Path(config.data.train)
    task = random_questions(packs, packs.parent, config.architecture.table_rows)
    told = []
    try:
        for step in range(STEPS):
            packs = [job.train.batch(n, n, job.batch_options) for n in range(PACKS)]
            set_rates(job.optimizer, config, step + 1)
            weight = sum(pack.weight_sum for pack in packs)
            step = Microbatches(iter(packs), PACKS, weight)
            result = train_step(job, step, 1.0, job.backend)
            told.append((float(result.loss), float(result.grad_norm)))
        with whole_weights(job.ddp_chunks):
            with evaluating(job.ddp_chunks):
                answers = generate(job, task, NEW_TOKENS)
            weights = named_weights(job.chunks[0])
            return told, {key: one.detach().clone() for key, one in weights.items()}, answers
    finally:
        process_groups.destroy()


def is_compared(key: str) -> bool:
    """Return whether a weight is more than rounding; softmax does not see biases of the keys'
    norms.
    """
    return not key.endswith("key_norm.bias")


def compare(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and answer with both kinds of layers."""
    plain = {name: value for name, value in settings.items() if name != "recompute"}
    (local_told, local, local_answers) = train(configure(folder, "local", **plain))
    (told, engine, answers) = train(configure(folder, "transformer_engine", **settings))
    distances = {
        key: float((engine[key] - weight).norm() / weight.norm().clamp_min(1e-12))
        for key, weight in local.items()
        if is_compared(key)
    }
    return {
        "same_keys": engine.keys() == local.keys(),
        "local": local_told,
        "engine": told,
        "farthest": max(distances.values()),
        "local_answers": local_answers,
        "answers": answers,
        "left": models_in_memory(),
    }


def main() -> None:
    """Compare every setting and print what was found."""
    from tests.gpu.models import SMALL

    torch_kernels.install()
    plain = make_packs(SMALL.features_per_tile)
    others = {"crosses": make_packs(1), "native": make_native_packs()}
    found = {}
    for name in sys.argv[2:] or SETTINGS:
        folder = next((others[kind] for kind in others if kind in SETTINGS[name]), plain)
        found[name] = compare(folder, SETTINGS[name])
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))
    # Threads of all groups would be left running while the process ends.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
