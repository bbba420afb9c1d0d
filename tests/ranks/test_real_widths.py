"""Resuming models of real widths, whose gradient buckets are those of megatron-core's own size.

Heavy, so it runs if ``MEGAVLM_WIDE=1`` asks for it: up to 12 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.models import MODELS
from megavlm.config.schema import Architecture, Config
from tests.data.samples import make_dataset
from tests.ranks.layouts import MASKS
from tests.ranks.pool import Pool
from tests.ranks.test_master_weights import different
from tests.ranks.test_resume import (
    STEPS,
    forget_the_end,
    losses,
    make_job,
    run_job,
    saved_tensors,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("MEGAVLM_WIDE") != "1", reason="heavy; MEGAVLM_WIDE=1 runs it"
)

_TINY = MODELS["tiny"]
# The smallest model that was seen to fail: two buckets, and a hidden size that is 3 x 64.
SMALL = dataclasses.replace(
    _TINY,
    language=dataclasses.replace(
        _TINY.language,
        vocab_size=131072,
        hidden_size=192,
        num_attention_heads=3,
        num_query_groups=3,
        kv_channels=64,
    ),
)
_1B = MODELS["internvl2_5-1b"]
# With two language layers the paddings happen to cancel at TP2; with three they do not. The head is
# tied, or saving takes 16 GB.
WHOLE_VOCABULARY = dataclasses.replace(
    _1B,
    vision=dataclasses.replace(_1B.vision, num_layers=1, image_size=28),
    language=dataclasses.replace(_1B.language, num_layers=3, tied_head=True),
)
# 14 heads and 2 query groups cannot be divided by four ranks: the same widths in other heads can.
FOUR_WAY_HEADS = dataclasses.replace(
    WHOLE_VOCABULARY,
    language=dataclasses.replace(
        WHOLE_VOCABULARY.language, num_attention_heads=28, num_query_groups=4, kv_channels=32
    ),
)
CUT_VOCABULARY = dataclasses.replace(
    WHOLE_VOCABULARY,
    language=dataclasses.replace(WHOLE_VOCABULARY.language, vocab_size=2048, tied_head=False),
)


def tensor(size: int, **settings: Any) -> dict[str, Any]:
    return dict(tensor_model_parallel_size=size) | settings


def pipeline(layout: str, **settings: Any) -> dict[str, Any]:
    return dict(pipeline_model_parallel_size=2, layout=layout) | settings


# Architecture, stage, bucket size (0: megatron-core's), ranks, layout; ranks and layout to resume
# at next.
CASES = {
    "small case": (SMALL, "2", 0, 1, dict(), 2, dict()),
    "TP2": (WHOLE_VOCABULARY, "2", 0, 2, tensor(2), 1, dict()),
    "TP4": (FOUR_WAY_HEADS, "2", 0, 4, tensor(4), 2, tensor(2)),
    "DP3": (CUT_VOCABULARY, "2", 0, 3, dict(), 2, tensor(2)),
    "PP2 DP3": (CUT_VOCABULARY, "2", 4_000_000, 6, pipeline("v,p,t|t*2,h"), 1, dict()),
    "virtual 2": (
        CUT_VOCABULARY,
        "2",
        4_000_000,
        2,
        pipeline("v|t|t|t", virtual_pipeline_model_parallel_size=2),
        3,
        dict(),
    ),
    "CP2": (CUT_VOCABULARY, "2", 0, 2, dict(context_parallel_size=2), 3, dict()),
    "vision=data": (CUT_VOCABULARY, "2", 0, 2, tensor(2, vision="data"), 3, dict()),
    "stage 1.5, DP3": (CUT_VOCABULARY, "1.5", 2_000_000, 3, dict(), 2, tensor(2)),
    "stage 1.5, TP2": (CUT_VOCABULARY, "1.5", 2_000_000, 2, tensor(2), 3, dict()),
    "stage 1, DP3": (CUT_VOCABULARY, "1", 500_000, 3, dict(), 2, pipeline("v,p,t|t*2,h")),
    "stage 1, virtual 2": (
        CUT_VOCABULARY,
        "1",
        500_000,
        2,
        pipeline("v|t|t|t", virtual_pipeline_model_parallel_size=2),
        3,
        dict(),
    ),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Replace the pool of the other tests by one that waits longer."""
    pool = Pool(timeout_seconds=900)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    found = {}
    for number, arch in enumerate((SMALL, WHOLE_VOCABULARY, FOUR_WAY_HEADS, CUT_VOCABULARY)):
        folder = tmp_path_factory.mktemp(f"packs-{number}") / "train"
        make_dataset(
            folder,
            packs=12,
            vocab_size=arch.language.vocab_size,
            context_token_id=7,
            tile_size=arch.vision.image_size,
            features_per_tile=arch.features_per_tile,
            capacity=48,
            alignment=4,
            samples_per_pack=2,
            text_tokens=(8, 24),
        )
        found[arch] = folder
    return found


def wide_job(dataset: Path, save: Path, arch: Architecture, **settings: Any) -> Config:
    job = make_job(dataset, save, global_batch_size=6, drop_path=0.0, **settings)
    return dataclasses.replace(job, architecture=arch)


def look_into(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the weights that differ from their master weights, and a digest of every tensor.

    A rank does it, because the tensors of two checkpoints need not fit into memory together.
    """
    tensors = saved_tensors(folder)
    digests = {
        key: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for key, value in tensors.items()
        if value.numel()
    }
    return different(tensors), digests


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_exactly(
    ranks: Pool, datasets: dict[Architecture, Path], tmp_path: Path, case: str
) -> None:
    arch, stage, bucket_size, world, layout, other_world, other = CASES[case]
    settings = dict(trainable=MASKS[stage], bucket_size=bucket_size, stage=stage)
    whole, same, changed = (tmp_path / name for name in ("whole", "same", "changed"))
    ranks.run(run_job, world, wide_job(datasets[arch], whole, arch, **settings | layout))
    [(wrong, digests)] = ranks.run(look_into, 1, whole / f"step_{STEPS:08d}")
    assert wrong == []
    assert any("exp_avg_sq" in key for key in digests)
    forget_the_end(whole, same)
    ranks.run(run_job, world, wide_job(datasets[arch], same, arch, **settings | layout))
    assert losses(same) == losses(whole)[3:]
    assert ranks.run(look_into, 1, same / f"step_{STEPS:08d}") == [([], digests)]
    shutil.rmtree(same)
    forget_the_end(whole, changed)
    ranks.run(run_job, other_world, wide_job(datasets[arch], changed, arch, **settings | other))
    assert losses(changed) == pytest.approx(losses(whole)[3:], rel=1e-5)
    shutil.rmtree(changed)
    shutil.rmtree(whole)
