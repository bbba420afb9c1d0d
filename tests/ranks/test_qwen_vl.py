"""Qwen2-VL and Qwen2.5-VL: their packs against their samples alone, their cost and memory against
what is counted, and their training at other layouts; images of any size, with windows that the
edges cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.recipes.qwen2_5_vl import ARCHITECTURE
from megavlm.config.schema import Architecture, Config
from megavlm.config.vision import PIXELS
from megavlm.planner.flops import pieces, training_cost
from tests.data.native_packs import Clip, Shown, native_sample, write_native
from tests.data.samples import write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import assert_pack_equals_samples_alone, recipe_config
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, Curve, train_curve
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_memory import assert_memory_is_held
from tests.ranks.test_resume import make_job, resume_bit_for_bit

# Tiles of two by two patches in windows of two by two tiles, in every second layer.
MODEL = dataclasses.replace(
    ARCHITECTURE,
    vision=dataclasses.replace(
        ARCHITECTURE.vision,
        image_size=8,
        patch_size=4,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=44,
        num_attention_heads=4,
        window_size=16,
        full_attention_layers=(1,),
    ),
    language=dataclasses.replace(
        ARCHITECTURE.language,
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=4,
        vocab_size=199,
        rotary_base=1e4,
        rotary_sections=(2, 3, 3),
        max_position_embeddings=512,
    ),
)
# Without windows; positions of three by three patches; features of two layers beside the last, one
# of which is the last.
DEEP = dataclasses.replace(
    MODEL,
    vision=dataclasses.replace(
        MODEL.vision,
        family="qwen3_vl",
        normalization="LayerNorm",
        activation="gelu_tanh",
        window_size=0,
        full_attention_layers=(),
        position_side=3,
        deepstack_layers=(0, 2),
    ),
    language=dataclasses.replace(
        MODEL.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        rotary_sections=(4, 2, 2),
        rotary_interleaved=True,
    ),
)
# Experts in every layer, also in those behind which features are added.
DEEP_EXPERTS = dataclasses.replace(
    DEEP,
    language=dataclasses.replace(
        DEEP.language,
        family="qwen3_moe",
        num_experts=4,
        experts_per_token=2,
        expert_ffn_hidden_size=24,
    ),
)
MODELS = {"qwen2_5_vl": MODEL, "qwen3_vl": DEEP}
TILE = MODEL.vision.image_size
FACTS = dict(tile_size=TILE, vocab_size=199, context_token_id=7)
# Whole windows, windows that the edges cut, one tile, none, two images; a video of an odd
# number of frames, which are far apart in time, beside an image, and one in pairs.
SHOWN: tuple[tuple[Shown, ...], ...] = (
    ((32, 32),),
    (Clip(size=(24, 16), frames=5, interval=3.3), (25, 57)),
    (),
    ((8, 8),),
    ((56, 40), Clip(size=(9, 20), frames=4, apart=True)),
    ((17, 33),),
)
EVERYDAY = {
    "qwen2_5_vl": ("DP2", "CP2", "TP2 PP2 SP", "TP2 CP2 whole vision layers"),
    "qwen3_vl": ("TP2 PP2 SP", "PP2 virtual 2", "TP2 CP2 whole vision layers"),
}

_config = partial(recipe_config, "qwen2_5_vl", trainable=EVERYTHING)
_of_all_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def make_packs(folder: Path, count: int, capacity: int, alignment: int = 4) -> None:
    """Write packs of three samples each, whose images are ``SHOWN`` in turn."""
    shown = [SHOWN[(3 * pack + sample) % 5] for pack in range(count) for sample in range(3)]
    write_native(folder, shown, per_pack=3, alignment=alignment, capacity=capacity, **FACTS)


def with_layers(model: Architecture, layers: int) -> Architecture:
    """Return a model with so many layers of both kinds."""
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, num_layers=layers),
        language=dataclasses.replace(model.language, num_layers=layers),
    )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_packs(folder, 12, 240)
    return folder


@_of_all_models
def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path, model: Architecture) -> None:
    rng = np.random.default_rng(1)
    samples = [
        native_sample(rng, sizes, line=line, words=9 + line, **FACTS)
        for line, sizes in enumerate(SHOWN, 1)
    ]
    write = partial(write_packs, tiling="native", thumbnail=False)
    sizes = FACTS | dict(features_per_tile=1)
    assert_pack_equals_samples_alone(
        ranks, partial(_config, model), samples, tmp_path, write=write, capacity=280, **sizes
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name, everyday in EVERYDAY.items()
        for layout in LAYOUTS
        if asks_for_all() or str(layout) in everyday
    ],
    ids=str,
)
def test_a_layout_trains_like_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Path,
    name: str,
    layout: Layout,
) -> None:
    architecture = with_layers(MODELS[name], layout.layers)
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs, **settings))
    settings |= layout.settings
    curves = ranks.run(train_curve, layout.ranks, _config(architecture, packs, **settings))
    assert max(compare(curves, expected).values()) <= LIMIT


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, dict(expert_model_parallel_size=2)),
        (
            4,
            dict(
                expert_model_parallel_size=2,
                pipeline_model_parallel_size=2,
                layout="v*3,c,t|t*2,h",
            ),
        ),
    ],
    ids=["EP2", "EP2 PP2"],
)
def test_experts_train_like_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Path,
    world: int,
    layout: dict,
) -> None:
    settings = dict(adam_eps=1e-3, steps=3, global_batch_size=4)
    expected = train_alone(_config(DEEP_EXPERTS, packs, **settings))
    curves = ranks.run(train_curve, world, _config(DEEP_EXPERTS, packs, **settings | layout))
    assert max(compare(curves, expected).values()) <= LIMIT


@pytest.mark.parametrize("mask", [EVERYTHING, ("connector", "language"), ("language",)])
def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path, mask: tuple[str, ...]) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count,
    # and windows that no edge cuts.
    language = dataclasses.replace(MODEL.language, vocab_size=256)
    architecture = dataclasses.replace(MODEL, language=language)
    facts = FACTS | dict(vocab_size=256)
    write_native(tmp_path, [((32, 32),), ((48, 32), (32, 48))], **facts)
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, mask, architecture)
    assert size["squared_tiles"] == 16**2 + 2 * 24**2
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, mask).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.mark.parametrize("recompute", ["selective", "full"])
@_of_all_models
def test_layers_that_are_recomputed_train_the_same(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Path,
    recompute: str,
    model: Architecture,
) -> None:
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(model, packs, **settings))
    config = _config(model, packs, recompute=recompute, **settings)
    assert max(compare(ranks.run(train_curve, 1, config), expected).values()) <= LIMIT


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, dict(pipeline_model_parallel_size=2, layout="even")),
        (2, dict(tensor_model_parallel_size=2, vision="data")),
    ],
    ids=["tensor", "pipeline", "vision encoder on each rank"],
)
@_of_all_models
def test_memory_is_what_a_model_that_is_built_takes(
    ranks: Pool, packs: Path, world: int, settings: dict, model: Architecture
) -> None:
    settings = dict(precision="bfloat16", global_batch_size=2) | settings
    assert_memory_is_held(ranks, _config(model, packs, **settings), world)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2_5_vl", dict(tensor_model_parallel_size=2, vision="tensor")),
        ("qwen2_5_vl", dict(tensor_model_parallel_size=2, vision="data")),
        ("qwen3_vl", dict(pipeline_model_parallel_size=2, layout="v*2|v,c,t*3,h")),
    ],
    ids=["TP2", "TP2 whole vision layers", "PP2 with DeepStack"],
)
def test_a_run_that_goes_on_is_the_same_bit_for_bit(
    ranks: Pool, tmp_path: Path, name: str, layout: dict
) -> None:
    packs = tmp_path / "packs"
    make_packs(packs, 12, 240)
    # The packs' pixels are normalised as InternVL's.
    mean, std = PIXELS["imagenet"]
    model = MODELS[name]
    encoder = dataclasses.replace(model.vision, pixel_mean=mean, pixel_std=std)
    architecture = dataclasses.replace(model, vision=encoder)

    def job(save: Path) -> Config:
        made = make_job(packs, save, trainable=EVERYTHING, drop_path=0.0, **layout)
        return dataclasses.replace(made, architecture=architecture, recipe="qwen2_5_vl", stage="2")

    resume_bit_for_bit(ranks, 2, job, tmp_path)
