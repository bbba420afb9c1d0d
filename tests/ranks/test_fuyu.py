"""Fuyu against ``transformers``, its packs against their samples alone, its cost and memory against
what is counted, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Config
from megavlm.config.vision import PIXELS
from megavlm.planner.flops import pieces, training_cost
from tests.convert.fuyu_models import KINDS, SMALL, make_fuyu
from tests.data.samples import make_dataset, make_sample
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_memory import assert_memory_is_held
from tests.ranks.test_resume import make_job, resume_bit_for_bit

TRAINABLE = ("connector", "language")
EVERYDAY = [
    layout
    for layout in LAYOUTS
    if asks_for_all()
    or str(layout) in ("DP2", "TP2 SP", "PP2", "CP2", "TP2 whole vision layers", "PP2 virtual 2")
]


_config = partial(recipe_config, "fuyu", trainable=TRAINABLE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    make_dataset(packs, packs=1, **sizes_of(architecture))
    folder = make_fuyu(tmp_path / "hf", architecture, torch.float32)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected)


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = sizes_of(SMALL)
    samples = [
        make_sample(rng, images=count, text_tokens=12 + 5 * n, line=n + 1, **sizes)
        for n, count in enumerate((1, 0, 2, 1))
    ]
    assert_pack_equals_samples_alone(
        ranks, partial(_config, SMALL), samples, tmp_path, capacity=200, **sizes
    )


@pytest.mark.parametrize("mask", [("connector",), TRAINABLE])
def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path, mask: tuple) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed, not counted.
    language = dataclasses.replace(SMALL.language, vocab_size=256)
    architecture = dataclasses.replace(SMALL, language=language)
    make_dataset(tmp_path, packs=1, image_share=1.0, **sizes_of(architecture))
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, mask, architecture)
    size["squared_lengths"] *= 2  # torch counts the pairs that a causal mask hides, too
    assert training_cost(architecture, mask).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=12, capacity=240, alignment=4, **sizes_of(SMALL))
    return folder


@pytest.mark.parametrize("layout", EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, train_alone: Callable[[Config], Curve], packs: Path, layout: Layout
) -> None:
    layers = max(4, layout.pipeline * layout.virtual)
    heads = dict(hidden_size=64, num_attention_heads=8, num_query_groups=8)
    language = dataclasses.replace(SMALL.language, num_layers=layers, **heads)
    architecture = dataclasses.replace(SMALL, language=language)
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs, **settings))
    settings |= layout.settings | {"layout": "even"}
    if layout.sequence:
        settings["recompute"] = "selective"  # of layers with biases, which others have not
    curves = ranks.run(train_curve, layout.ranks, _config(architecture, packs, **settings))
    assert max(compare(curves, expected).values()) <= LIMIT


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, dict(pipeline_model_parallel_size=2, layout="even")),
        (2, dict(tensor_model_parallel_size=2, vision="data")),
    ],
    ids=["tensor", "pipeline", "connector on each rank"],
)
def test_memory_is_what_a_model_that_is_built_takes(
    ranks: Pool, tmp_path: Path, world: int, settings: dict
) -> None:
    make_dataset(tmp_path, packs=3, capacity=128, alignment=4, **sizes_of(SMALL))
    settings = dict(precision="bfloat16", global_batch_size=2) | settings
    assert_memory_is_held(ranks, _config(SMALL, tmp_path, **settings), world)


def test_a_run_that_goes_on_is_the_same_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    # The packs' pixels are normalised as InternVL's.
    mean, std = PIXELS["imagenet"]
    vision = dataclasses.replace(SMALL.vision, pixel_mean=mean, pixel_std=std)
    packs = tmp_path / "packs"
    make_dataset(packs, packs=12, capacity=200, **sizes_of(SMALL))

    def job(save: Path) -> Config:
        layout = dict(pipeline_model_parallel_size=2, layout="t*2|t")
        made = make_job(packs, save, trainable=TRAINABLE, **layout)
        architecture = dataclasses.replace(SMALL, vision=vision)
        return dataclasses.replace(made, architecture=architecture, recipe="fuyu", stage="1")

    whole = resume_bit_for_bit(ranks, 2, job, tmp_path)
    assert "model.connector.linear.weight" in whole
