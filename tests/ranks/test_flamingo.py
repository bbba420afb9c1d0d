"""Flamingo: logits against ``transformers``, what reads which image, its cost against torch's
count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.recipes.flamingo import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.data.sample import Sample
from megavlm.planner.flops import pieces, training_cost
from tests.convert.idefics_models import FLAMINGO, KINDS, make_idefics
from tests.data.samples import make_sample, write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    CONTEXT,
    END,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, config_for, train_curve, whole_weights
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare

STEPS = dict(adam_eps=1e-3, steps=4)
MASK = STAGES["1"].training.trainable
# Gates that are open: at zero nothing behind them has a gradient.
OPEN = dataclasses.replace(
    FLAMINGO, cross_attention=dataclasses.replace(FLAMINGO.cross_attention, gate_start=0.7)
)
EVERYDAY = [
    layout
    for layout in LAYOUTS
    if asks_for_all() or str(layout) in ("TP2 SP", "PP2", "CP2", "DP2", "TP2 whole vision layers")
]


def _config(architecture: Architecture, packs: Path, **settings) -> Config:
    settings = {"trainable": MASK} | settings
    return dataclasses.replace(
        config_for(packs, **settings), architecture=architecture, recipe="flamingo"
    )


def document(
    rng: np.random.Generator, architecture: Architecture, images: int, words: int, line: int
) -> Sample:
    """Make a text with images anywhere in it, and texts that end in the middle of it."""
    sizes = sizes_of(architecture)
    sample = make_sample(rng, images=images, text_tokens=words, line=line, grids=((1, 1),), **sizes)
    order = rng.permutation(sample.length)
    tokens = sample.tokens[order]
    tokens[(tokens == END) & (np.arange(len(tokens)) % 3 > 0)] = END + 1
    supervised = (tokens != CONTEXT) & (np.arange(len(tokens)) > 0)
    return dataclasses.replace(sample, tokens=tokens, supervised=supervised)


def documents(architecture: Architecture, images: tuple[int, ...], seed: int = 1) -> list[Sample]:
    """Make documents with so many images."""
    rng = np.random.default_rng(seed)
    return [
        document(rng, architecture, number, 9 + 4 * line, line)
        for line, number in enumerate(images, start=1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    samples = documents(architecture, (1, 0, 3, 2))
    # Behind an end no image is read until the next one.
    tokens = samples[0].tokens
    tokens[np.flatnonzero(tokens == CONTEXT)[0] + 1] = END
    packs = tmp_path / "packs"
    write_packs(packs, [samples], capacity=96, end_token_id=END, **sizes_of(architecture))
    folder = make_idefics(tmp_path / "hf", architecture, torch.float32, spread=0.1)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write packs of documents; some have no image."""
    folder = tmp_path_factory.mktemp("packs") / "train"
    rng = np.random.default_rng(0)
    lines = count(1)
    contents = [(1, 0, 3), (0, 0), (2, 1, 1), (0, 2)] * 3
    chosen = [
        [document(rng, OPEN, number, int(rng.integers(8, 26)), next(lines)) for number in images]
        for images in contents
    ]
    sizes = sizes_of(OPEN)
    write_packs(folder, chosen, capacity=128, alignment=4, end_token_id=END, **sizes)
    return folder


def _of_layers(layers: int) -> Architecture:
    """Return a model whose both parts have so many layers, and heads that divide."""
    vision = dataclasses.replace(OPEN.vision, num_layers=layers, num_attention_heads=4)
    language = dataclasses.replace(
        OPEN.language, num_layers=layers, num_attention_heads=4, num_query_groups=4
    )
    return dataclasses.replace(OPEN, vision=vision, language=language)


@pytest.fixture(scope="module")
def alone(ranks: Pool, packs: Path) -> Callable[[int], Curve]:
    """Return a cached function that trains a model of so many layers in one process."""
    return cache(
        lambda layers: ranks.run(train_curve, 1, _config(_of_layers(layers), packs, **STEPS))[0]
    )


@pytest.mark.parametrize("layout", EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, packs: Path, alone: Callable[[int], Curve], layout: Layout
) -> None:
    config = _config(_of_layers(layout.layers), packs, **STEPS, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    assert max(compare(curves, alone(layout.layers)).values()) <= LIMIT


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_images_go_along_the_pipeline_and_through_what_is_recomputed(
    ranks: Pool, packs: Path, alone: Callable[[int], Curve], recompute: str
) -> None:
    layout = dict(
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        layout="v*3,c,t|t*2,h",
        recompute=recompute,
    )
    curves = ranks.run(train_curve, 4, _config(_of_layers(3), packs, **STEPS, **layout))
    assert max(compare(curves, alone(3)).values()) <= LIMIT


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    assert_pack_equals_samples_alone(
        ranks,
        partial(_config, OPEN),
        documents(OPEN, (2, 0, 1, 3)),
        tmp_path,
        capacity=128,
        **sizes_of(OPEN),
    )
