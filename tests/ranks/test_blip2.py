"""BLIP-2's second stage: logits against ``transformers``, packs against their samples alone, its
cost against torch's count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.recipes.blip2 import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import pieces, training_cost
from tests.convert.blip2_models import KINDS, OPT, make_blip2
from tests.data.samples import make_dataset, make_sample, write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    CONTEXT,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve, whole_weights
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare

MASK = STAGES["2"].training.trainable
EVERYDAY = [
    layout
    for layout in LAYOUTS
    if asks_for_all() or str(layout) in ("TP2 SP", "PP2", "CP2", "DP2", "TP2 whole vision layers")
]
TIED = ("opt", "llama") if not asks_for_all() else tuple(KINDS)


_config = partial(recipe_config, "blip2")


def captions(architecture: Architecture, lengths: tuple[int, ...]) -> list:
    """Make samples of one image each, with so many tokens of text."""
    rng = np.random.default_rng(1)
    sizes = sizes_of(architecture)
    return [
        make_sample(rng, images=1, text_tokens=length, line=number, **sizes)
        for number, length in enumerate(lengths, start=1)
    ]


@pytest.mark.parametrize("kind", TIED)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    samples = captions(architecture, (9, 4, 17))
    write_packs(packs, [samples], capacity=96, **sizes_of(architecture))
    folder = make_blip2(tmp_path / "hf", architecture, torch.float32, CONTEXT, spread=0.05)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected)


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    samples = captions(OPT, (12, 5, 27, 8))
    sizes = sizes_of(OPT)
    assert_pack_equals_samples_alone(
        ranks, partial(_config, OPT), samples, tmp_path, capacity=128, **sizes
    )


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    language = dataclasses.replace(OPT.language, vocab_size=256)
    architecture = dataclasses.replace(OPT, language=language)
    make_dataset(tmp_path, packs=1, image_share=1.0, **sizes_of(architecture))
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, MASK, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, MASK).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=12, capacity=240, alignment=4, **sizes_of(OPT))
    return folder


@pytest.mark.parametrize("layout", EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, train_alone: Callable[[Config], Curve], packs: Path, layout: Layout
) -> None:
    layers = max(2, layout.layers)
    architecture = dataclasses.replace(
        OPT,
        vision=dataclasses.replace(OPT.vision, num_layers=layers, num_attention_heads=4),
        # Heads divide among four ranks.
        language=dataclasses.replace(
            OPT.language, num_layers=layers, num_attention_heads=8, num_query_groups=8
        ),
    )
    settings = dict(trainable=MASK, adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs, **settings))
    if layout.sequence:
        settings["recompute"] = "selective"  # of layers with biases, which others have not
    config = _config(architecture, packs, **settings, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    assert max(compare(curves, expected).values()) <= LIMIT


def test_frozen_parts_stay_bit_for_bit_and_the_norm_behind_the_encoder_is_trained(
    ranks: Pool, packs: Path
) -> None:
    fresh = whole_weights(ranks.run(train_curve, 1, _config(OPT, packs, trainable=MASK, steps=0)))
    after = whole_weights(ranks.run(train_curve, 1, _config(OPT, packs, trainable=MASK, steps=2)))
    changed = {key for key, weight in after.items() if not np.array_equal(weight, fresh[key])}
    assert changed == {key for key in after if key.startswith("connector.")}
    assert "connector.norm.weight" in changed
