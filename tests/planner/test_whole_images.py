"""Costs and sizes of vision encoders whose patches see all tiles of an image."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megavlm.config.connectors import Connector
from megavlm.config.models import MODELS
from megavlm.config.recipes import recipe
from megavlm.config.schema import Architecture, Language, Parallel, Vision
from megavlm.planner.activations import activation_memory
from megavlm.planner.flops import Cost, pieces, training_cost
from megavlm.planner.layout import make_layout
from megavlm.planner.partition import PackSize
from megavlm.planner.rank_load import RankLoad, image_tiles
from tests.planner.test_estimate import SIZE, run

SMALL = Architecture(
    vision=Vision(
        family="qwen2_5_vl",
        image_size=4,
        patch_size=2,
        temporal_patch_size=2,
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=10,
        num_attention_heads=2,
        normalization="RMSNorm",
        activation="swiglu",
        window_size=8,
        full_attention_layers=(1,),
    ),
    connector=Connector(kind="merger"),
    language=Language(
        num_layers=1,
        hidden_size=12,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        vocab_size=30,
    ),
    image_tokens="qwen2_vl",
)
# Two images, of 4 x 4 and 2 x 6 tiles of 4 patches, and windows of 2 x 2 tiles.
DATA = dict(tokens=40.0, squared_lengths=800.0, tiles=28.0, squared_tiles=16.0**2 + 12.0**2)

PATCHES = 28 * 4
EMBEDDING = PATCHES * 2 * (3 * 2 * 2) * 8
LINEAR = PATCHES * 2 * (4 * 8 * 8 + 3 * 8 * 10)
IN_WINDOWS = PATCHES * 4 * (4 * 4) * 8
IN_IMAGES = ((4 * 16) ** 2 + (4 * 12) ** 2) * 4 * 8
VISION = EMBEDDING + 3 * LINEAR + 2 * IN_WINDOWS + IN_IMAGES
CONNECTOR = 28 * 2 * (32 * 32 + 32 * 12)


def cost_of(**vision: object) -> Cost:
    changed = dataclasses.replace(SMALL.vision, **vision)
    return training_cost(dataclasses.replace(SMALL, vision=changed), ())


def test_patches_see_their_window_or_all_of_their_image():
    cost = training_cost(SMALL, ()).by_part(**DATA)
    assert cost["vision"] == VISION
    assert cost["connector"] == CONNECTOR
    everywhere = cost_of(window_size=0, full_attention_layers=()).by_part(**DATA)
    assert everywhere["vision"] == VISION + 2 * (IN_IMAGES - IN_WINDOWS)


def test_what_is_trained_has_gradients_there_too():
    cost = training_cost(SMALL, ("vision", "connector", "language")).by_part(**DATA)
    assert cost["vision"] == 3 * VISION - EMBEDDING
    assert cost["connector"] == 3 * CONNECTOR


def test_the_gate_of_the_mlp_is_kept_too():
    config = dataclasses.replace(run("2"), architecture=SMALL)
    [chunk] = make_layout(config, SIZE).chunks
    load = RankLoad(tokens=0.0, tiles=7.0)
    gated, plain = (
        activation_memory(
            dataclasses.replace(config, architecture=dataclasses.replace(SMALL, vision=vision)),
            chunk,
            load,
        ).per_microbatch
        for vision in (SMALL.vision, dataclasses.replace(SMALL.vision, activation="gelu"))
    )
    assert gated - plain == 2 * 3 * 7 * 4 * 10, "one more number of 16 bits for each inside"


def test_ranks_with_whole_images_have_padding() -> None:
    """All have as many as the one with most: the mean, and half or two thirds of an image."""
    shared = Parallel(tensor_model_parallel_size=2, vision="data")
    assert RankLoad.most(Parallel(), 1, 400.0, image_tiles=100.0).tiles == 400
    assert RankLoad.most(shared, 1, 400.0).tiles == 200
    assert RankLoad.most(shared, 1, 400.0, image_tiles=100.0).tiles == 250
    of_three = Parallel(context_parallel_size=3)
    assert RankLoad.most(of_three, 1, 400.0, image_tiles=100.0).tiles == 200
    assert RankLoad.mean(of_three, 1, 400.0, image_tiles=100.0).tiles == pytest.approx(167, abs=1)
    assert RankLoad.most(shared, 1, 100.0, image_tiles=1000.0).tiles == 100, "one has all"
    size = PackSize(tokens=9.0, squared_lengths=9.0, tiles=400.0, squared_tiles=4e4)
    assert image_tiles(SMALL, size) == 100
    assert image_tiles(MODELS["tiny"], size) == 0


def in_transformers(name: str, arch: Architecture) -> torch.nn.Module:
    """Make the model of transformers without memory for its weights."""
    import transformers

    vision = arch.vision
    language = arch.language
    sizes = dict(
        depth=vision.num_layers,
        num_heads=vision.num_attention_heads,
        patch_size=vision.patch_size,
        spatial_merge_size=vision.grid,
        temporal_patch_size=vision.temporal_patch_size,
    )
    if name == "qwen2_vl":
        sizes |= dict(
            embed_dim=vision.hidden_size,
            hidden_size=language.hidden_size,
            mlp_ratio=vision.ffn_hidden_size // vision.hidden_size,
        )
    else:
        sizes |= dict(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            out_hidden_size=language.hidden_size,
        )
    (settings, model) = {
        "qwen2_vl": (
            transformers.Qwen2VLConfig,
            transformers.Qwen2VLForConditionalGeneration,
        ),
        "qwen2_5_vl": (
            transformers.Qwen2_5_VLConfig,
            transformers.Qwen2_5_VLForConditionalGeneration,
        ),
    }[name]
    config = settings(
        vision_config=sizes,
        text_config=dict(
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_query_groups,
            vocab_size=language.vocab_size,
        ),
        tie_word_embeddings=language.tied_head,
    )
    with torch.device("meta"):
        return model(config)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_models_have_as_many_parameters_as_in_transformers(name: str):
    arch = recipe(name).architecture
    theirs = in_transformers(name, arch)
    ours = {"vision": 0, "connector": 0, "language": 0}
    for piece in pieces(arch):
        ours[piece.key.split(".")[0] or "vision"] += piece.elements
    assert sum(ours.values()) == theirs.num_parameters()
    assert ours["connector"] == sum(
        weight.numel() for weight in theirs.model.visual.merger.parameters()
    )
    assert ours["vision"] + ours["connector"] == theirs.model.visual.num_parameters()
