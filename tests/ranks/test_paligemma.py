"""PaliGemma and PaliGemma 2 against ``transformers``, their packs against the samples alone, their
cost against torch's count, and their training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Architecture, Checkpoint, Config
from megavlm.config.vision import PIXELS
from megavlm.data.loading.dataset import PackedDataset
from megavlm.model.positions import resize_positions
from megavlm.planner.flops import pieces, training_cost
from tests.convert.paligemma_models import KINDS, PALIGEMMA2, SMALL, make_paligemma
from tests.data.samples import make_dataset, make_sample
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    WORLDS,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, Curve, train_curve
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_resume import run_job, saved_tensors

LAYOUTS_OF_LOGITS = WORLDS | {
    "pp2, in the encoder": (2, dict(pipeline_model_parallel_size=2, layout="v*2|c,t*2,h")),
}
ONE_TILE = ((1, 1),)
EVERYDAY = {SMALL: ("DP2", "TP2 whole vision layers"), PALIGEMMA2: ("TP2 SP", "PP2")}
CASES = [
    (model, layout)
    for model, everyday in EVERYDAY.items()
    for layout in LAYOUTS
    if layout.context == 1 and (asks_for_all() or str(layout) in everyday)
]


_config = partial(recipe_config, "paligemma")


def _named(model: Architecture) -> str:
    return model.language.family


@pytest.mark.parametrize("kind", KINDS if asks_for_all() else ("tied", "PaliGemma 2"))
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    make_dataset(packs, packs=1, **sizes_of(architecture))
    folder = make_paligemma(tmp_path / "hf", architecture, torch.float32)
    expected = answers_of_transformers(folder, packs, architecture)
    assert_equals_transformers(
        ranks,
        partial(_config, architecture, packs),
        folder,
        expected,
        LAYOUTS_OF_LOGITS,
    )


@pytest.mark.parametrize("model", EVERYDAY if asks_for_all() else [SMALL], ids=_named)
def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path, model: Architecture) -> None:
    rng = np.random.default_rng(1)
    sizes = sizes_of(model)
    samples = [
        make_sample(rng, images=count, text_tokens=12 + 5 * n, line=n + 1, grids=ONE_TILE, **sizes)
        for n, count in enumerate((1, 0, 2, 1))
    ]
    assert_pack_equals_samples_alone(
        ranks, partial(_config, model), samples, tmp_path, capacity=200, **sizes
    )


@pytest.mark.parametrize("model", EVERYDAY, ids=_named)
def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path, model: Architecture) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed, not counted.
    language = dataclasses.replace(model.language, vocab_size=256)
    architecture = dataclasses.replace(model, language=language)
    make_dataset(tmp_path, packs=1, image_share=1.0, **sizes_of(architecture))
    batch = PackedDataset(tmp_path).batch(0, 0)
    lengths = batch.sample_ends.diff().double()
    prefixes = batch.prefixes.ends.diff().double()
    for mask in (("connector",), EVERYTHING):
        [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, mask, architecture)
        if language.attends_in_blocks:
            # All pairs of a short sample. Behind, queries and keys are multiplied again, which is
            # half of the forward pass.
            counted -= (
                size["squared_lengths"]
                // 2
                * sum(
                    piece.forward
                    for piece in pieces(architecture)
                    if piece.unit == "squared_length"
                )
            )
        else:
            # Two calls a sample: prefix with prefix, and the rest with everything.
            seen = prefixes**2 + (lengths - prefixes) * lengths
            assert size["squared_lengths"] > seen.sum() > size["squared_lengths"] / 2
            size["squared_lengths"] = int(seen.sum())
        assert training_cost(architecture, mask).total(**size) == counted
        assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    """Return a function that gives the packs of a model."""

    def write(model: Architecture) -> Path:
        folder = tmp_path_factory.mktemp("packs")
        make_dataset(folder, packs=12, capacity=240, alignment=4, **sizes_of(model))
        return folder

    return cache(write)


@pytest.mark.parametrize(
    ("model", "layout"), CASES, ids=[f"{_named(model)} {layout}" for model, layout in CASES]
)
def test_a_layout_trains_like_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Callable[[Architecture], Path],
    model: Architecture,
    layout: Layout,
) -> None:
    layers = max(2, layout.layers)
    architecture = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, num_layers=layers, num_attention_heads=4),
        language=dataclasses.replace(model.language, num_layers=layers, num_attention_heads=8),
    )
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs(model), **settings))
    config = _config(architecture, packs(model), **settings, **layout.settings)
    assert max(compare(ranks.run(train_curve, layout.ranks, config), expected).values()) <= LIMIT


@pytest.mark.parametrize("layout", [(1, {}), (2, dict(pipeline_model_parallel_size=2))])
def test_a_stage_of_higher_resolution_starts_with_resized_positions(
    ranks: Pool, tmp_path: Path, layout: tuple[int, dict]
) -> None:
    world, settings = layout
    runs = {}
    for stage, size in (("1", 16), ("2", 32)):
        # The packs' pixels are normalised as InternVL's.
        mean, std = PIXELS["imagenet"]
        vision = dataclasses.replace(SMALL.vision, image_size=size, pixel_mean=mean, pixel_std=std)
        architecture = dataclasses.replace(SMALL, vision=vision)
        packs = tmp_path / f"packs{stage}"
        make_dataset(packs, packs=4, capacity=320, grids=ONE_TILE, **sizes_of(architecture))
        files = Checkpoint(
            save=str(tmp_path / stage),
            load=str(runs["1"]) if runs else "",
            moments="keep" if runs else "fresh",
        )
        lr = 1e-3 if stage == "1" else 1e-9
        config = _config(architecture, packs, steps=2, lr=lr, weight_decay=0.0, **settings)
        config = dataclasses.replace(config, stage=stage, checkpoint=files)
        assert ranks.run(run_job, world, config) == [2] * world
        runs[stage] = tmp_path / stage / "step_00000002"
    before, after = (ranks.run(saved_tensors, 1, runs[stage])[0] for stage in ("1", "2"))
    key = "model.vision.position_embedding"
    assert before[key].shape == (1, 16, 36) and after[key].shape == (1, 64, 36)
    expected = resize_positions(before[key], 8, 0)
    torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-6)
    for name, tensor in before.items():
        if name.startswith("model.") and name != key:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
