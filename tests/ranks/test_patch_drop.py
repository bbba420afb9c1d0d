"""Dropped patches: what the encoder sees of a tile, gradient caching, and the planner."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.schema import Architecture, Config
from megavlm.data.loading.batch import BatchOptions
from megavlm.planner.flops import pieces, training_cost
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, train_curve
from tests.ranks.test_contrastive import (
    CLIP,
    DROPPED,
    EVERYTHING,
    SIGLIP,
    assert_same,
    config_of,
    pack_pairs,
)

MEAN = dataclasses.replace(DROPPED, connector=dataclasses.replace(CLIP.connector, kind="mean"))
SIGLIP_DROPPED = dataclasses.replace(
    SIGLIP, vision=dataclasses.replace(SIGLIP.vision, patch_drop=0.7)
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs a pack."""
    folder = tmp_path_factory.mktemp("pairs") / "packs"
    pack_pairs(folder, packs=4, samples_per_pack=4, text_tokens=(4, 12), capacity=64)
    return folder


def draw_by_pair(seed: int, position: int, patches: int, tiles: int) -> np.ndarray:
    """Return draws that belong to a pair wherever packs begin, if all are equally large."""
    first = position * tiles
    pairs = range(first, first + tiles)
    return np.stack([np.random.default_rng([seed, pair]).random(patches) for pair in pairs], axis=1)


def train_in_order(config: Config, packs: int) -> Curve:
    """Train on all packs in their order, with draws that depend on the pair alone."""
    from megavlm.data.loading import dataset

    usual = dataset.patch_draws
    dataset.patch_draws = draw_by_pair
    try:
        return train_curve(config, tuple(range(packs)))
    finally:
        dataset.patch_draws = usual


def test_four_microbatches_drop_the_patches_of_one_batch(
    ranks: Pool, pairs: Path, tmp_path: Path
) -> None:
    words = dict(text_tokens=(4, 12), capacity=256)
    pack_pairs(tmp_path / "one", packs=1, samples_per_pack=16, **words)
    usual = dict(drop_path=0.0, steps=3)
    four = ranks.run(train_in_order, 1, config_of(DROPPED, pairs, **usual), 4)
    whole = config_of(DROPPED, tmp_path / "one", **usual, global_batch_size=1)
    assert_same(ranks.run(train_in_order, 1, whole, 1), four)
    plain = ranks.run(train_in_order, 1, config_of(CLIP, pairs, **usual), 4)
    assert plain[0].losses != pytest.approx(four[0].losses, rel=1e-3)


def embed_by_hand(config: Config) -> tuple[float, tuple[int, ...]]:
    """Return how far embedded tiles are from the kept ones of whole tiles, and their shape."""
    import torch

    job = build(config)
    vision = job.chunks[0].vision
    batch = job.train.batch(
        0, 5, BatchOptions(patches=config.architecture.vision.patch_choice, seed=2)
    )
    classes = int(config.architecture.vision.has_class_token)
    with torch.no_grad():
        whole = vision.embed(batch.tiles)
        found = vision.embed(batch.tiles, batch.kept_patches)
    expected = [
        torch.cat([whole[:classes, tile], whole[[classes + int(one) for one in kept], tile]])
        for tile, kept in enumerate(batch.kept_patches.T)
    ]
    return float((found - torch.stack(expected, dim=1)).abs().max()), tuple(found.shape)


@pytest.mark.parametrize("architecture", [DROPPED, SIGLIP_DROPPED], ids=["clip", "siglip"])
def test_the_encoder_sees_kept_patches_at_their_positions(
    ranks: Pool, pairs: Path, architecture: Architecture
) -> None:
    [(difference, shape)] = ranks.run(embed_by_hand, 1, config_of(architecture, pairs))
    assert difference == 0
    kept = {"clip": 1 + 8, "siglip": 4}[architecture.vision.family]
    assert shape == (kept, 4, 32) == (architecture.vision.layer_tokens, 4, 32)


def counted_by_torch(config: Config) -> tuple[int, dict[str, int], set[str]]:
    """Return the FLOPs of forward and backward pass of one pack, without those of the loss; the
    pack's size; the keys of the weights.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megavlm.model.weights import named_weights
    from megavlm.train.pipeline import run_pipeline

    job = build(config)
    vision = config.architecture.vision
    options = BatchOptions(vision_layers=vision.num_layers, patches=vision.patch_choice)
    batch = job.train.batch(0, 0, options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_pipeline(job.ddp_chunks, iter([batch]), 1, lambda _, output: output.sum(), job.backend)
    lengths = batch.sample_ends.diff().to(torch.float64)
    size = {
        "tokens": len(batch.tokens),
        "squared_lengths": int((lengths**2).sum()),
        "tiles": len(batch.tiles),
    }
    return counter.get_total_flops(), size, set(named_weights(job.chunks[0]))


@pytest.mark.parametrize(
    "architecture", [CLIP, DROPPED, MEAN, SIGLIP_DROPPED], ids=["all", "class", "mean", "attention"]
)
def test_the_cost_of_pairs_is_what_torch_counts(
    ranks: Pool, pairs: Path, architecture: Architecture
) -> None:
    config = config_of(architecture, pairs, overlap_grad_reduce=False)
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, config)
    if architecture.language.is_causal:  # torch counts all pairs of tokens
        size["squared_lengths"] *= 2
    if architecture.connector.kind == "attention":  # the projection of its query, once a pack
        counted -= 3 * 2 * architecture.vision.hidden_size**2
    assert training_cost(architecture, EVERYTHING).total(**size) == pytest.approx(counted)
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.mark.parametrize(
    ("share", "objective", "message"),
    [
        (1.0, "contrastive", "--architecture.vision.patch_drop 1.0: must be 0 or more, and less"),
        (-0.5, "contrastive", "--architecture.vision.patch_drop -0.5: must be 0 or more"),
        (0.5, "next_token", "--architecture.objective next_token reads every patch; use 0"),
    ],
)
def test_what_cannot_drop_patches_is_refused(share: float, objective: str, message: str) -> None:
    from megavlm.config.checks.architecture import architecture_problems
    from tests.ranks.runs import TINY

    model: Any = {"contrastive": CLIP, "next_token": TINY}[objective]
    vision = dataclasses.replace(model.vision, patch_drop=share)
    [found] = architecture_problems(dataclasses.replace(model, vision=vision))
    assert message in found
