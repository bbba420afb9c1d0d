"""LLaVA against ``transformers``, its packs against their samples alone, its cost against torch's
count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.llava import STAGES
from megavlm.config.schema import Checkpoint, Config, Init
from megavlm.planner.flops import pieces, training_cost
from tests.convert.llava_models import KINDS, LINEAR, SIGLIP, SMALL, make_llava
from tests.convert.models import load_all
from tests.convert.part_folders import make_language, make_vision
from tests.data.samples import make_dataset, make_sample
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    pack_records,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_resume import run_job
from tests.ranks.test_whole_way import write_records

MASKS = {name: stage.training.trainable for name, stage in STAGES.items()}
SEEING, *_ = SIGLIP.values()
KINDS = KINDS | (SIGLIP if asks_for_all() else {"siglip": SEEING})
MODELS = {
    "clip": SMALL,
    "linear": dataclasses.replace(SMALL, connector=LINEAR),
    "siglip": SEEING,
}
EVERYDAY = {
    "clip": ("TP2 SP", "PP2"),
    "siglip": ("TP2 SP",),
}


_config = partial(recipe_config, "llava")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    make_dataset(packs, packs=1, **sizes_of(architecture))
    folder = make_llava(tmp_path / "hf", architecture, torch.float32, 7, spread=0.05)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected)


@pytest.mark.parametrize("connector", ["mlp", "linear"])
def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path, connector: str) -> None:
    kind = {"mlp": SMALL.connector, "linear": LINEAR}[connector]
    architecture = dataclasses.replace(SMALL, connector=kind)
    rng = np.random.default_rng(1)
    sizes = sizes_of(architecture)
    samples = [
        make_sample(rng, images=count, text_tokens=12 + 5 * n, line=n + 1, **sizes)
        for n, count in enumerate((1, 0, 2, 1))
    ]
    assert_pack_equals_samples_alone(
        ranks, partial(_config, architecture), samples, tmp_path, capacity=320, **sizes
    )


@pytest.mark.parametrize(
    ("mask", "kind"), [("1", "clip"), ("2", "clip"), ("2", "linear"), ("2", "siglip")]
)
def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path, mask: str, kind: str) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    language = dataclasses.replace(MODELS[kind].language, vocab_size=256)
    architecture = dataclasses.replace(MODELS[kind], language=language)
    make_dataset(tmp_path, packs=1, image_share=1.0, **sizes_of(architecture))
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, MASKS[mask], architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    # megatron-core's linear layer makes the gradient of its input, needed or not.
    unneeded = sum(
        piece.forward * size["tiles"]
        for piece in pieces(architecture)
        if piece.key == "connector.mlp.linear_fc1.weight"
    )
    assert training_cost(architecture, MASKS[mask]).total(**size) + unneeded == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the packs of a kind of model."""

    def write(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("packs")
        make_dataset(folder, packs=12, capacity=240, alignment=4, **sizes_of(MODELS[kind]))
        return folder

    return cache(write)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind, everyday in EVERYDAY.items()
        for layout in LAYOUTS
        if asks_for_all() or str(layout) in everyday
    ],
    ids=str,
)
def test_a_layout_trains_like_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Callable[[str], Path],
    kind: str,
    layout: Layout,
) -> None:
    small = MODELS[kind]
    layers = max(2, layout.layers)
    architecture = dataclasses.replace(
        small,
        vision=dataclasses.replace(small.vision, num_layers=layers, num_attention_heads=4),
        language=dataclasses.replace(
            small.language, num_layers=layers, num_attention_heads=4, num_query_groups=2
        ),
    )
    settings = dict(trainable=MASKS["2"], adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs(kind), **settings))
    config = _config(architecture, packs(kind), **settings, **layout.settings)
    assert max(compare(ranks.run(train_curve, layout.ranks, config), expected).values()) <= LIMIT


@pytest.mark.parametrize(("kind", "tiling"), [("clip", "pad"), ("siglip", "stretch")])
def test_a_run_from_parts_exports_the_layers_that_it_did_not_use(
    ranks: Pool, tmp_path: Path, kind: str, tiling: str
) -> None:
    from megavlm.convert.hf import from_parts
    from megavlm.convert.hf.reference import load_reference

    init = Init(
        vision=str(make_vision(tmp_path / "vision", kind)),
        language=str(make_language(tmp_path / "language")),
    )
    known = RECIPES["llava"].architecture
    architecture = from_parts.read_model("", init, known)
    assert (architecture.vision.num_layers, architecture.vision.unused_layers) == (2, 1)
    pack_records(
        write_records(tmp_path),
        init.language,
        tmp_path / "packs",
        architecture,
        template="llava_chatml",
        mode=tiling,
    )
    config = _config(architecture, tmp_path / "packs", trainable=("connector",), steps=2)
    files = Checkpoint(save=str(tmp_path / "run"), export_hf=str(tmp_path / "hf"))
    config = dataclasses.replace(config, stage="1", init=init, checkpoint=files)
    assert ranks.run(run_job, 1, config) == [2]
    found = load_reference(tmp_path / "hf").model.vision_tower.state_dict()
    before = load_all(tmp_path / "vision")
    assert any("layers.2." in name for name in before)
    assert any("head.probe" in name for name in before) == (kind == "siglip")
    for name, tensor in before.items():
        assert torch.equal(found[name.removeprefix("vision_model.")], tensor), name
