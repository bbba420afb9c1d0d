"""The vision encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, from and to their section of
config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.schema import Architecture, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.qwen_vl_kinds import Kind

# Of published models, for checkpoints from before videos, which do not say.
_TOKENS_PER_SECOND = 2
# Frames of videos are read in pairs.
_FRAMES = 2
# The classes state both in their code.
_EPSILON = 1e-6
_ROTATION = {"rope_type": "axial", "rope_theta": 1e4}
_SECTION = "vision_config"
# Sizes that only some have, by family.
_SIZES = {
    "qwen2_vl": ("mlp_ratio",),
    "qwen2_5_vl": ("intermediate_size", "window_size", "tokens_per_second"),
    "qwen3_vl": ("intermediate_size", "num_position_embeddings"),
}


def read(settings: Mapping[str, Any], folder: Path, kind: Kind) -> Vision:
    """Read a vision encoder.

    Args:
        settings: its section of config.json, without problems.
        folder: of the model.
        kind: of the model.
    """
    own = {"qwen2_vl": _fields_of_2, "qwen2_5_vl": _fields_of_2_5, "qwen3_vl": _fields_of_3}
    return Vision(
        family=kind.family,
        image_size=settings["patch_size"] * settings["spatial_merge_size"],
        patch_size=settings["patch_size"],
        temporal_patch_size=settings["temporal_patch_size"],
        num_layers=settings["depth"],
        hidden_size=settings[kind.width],
        num_attention_heads=settings["num_heads"],
        layernorm_epsilon=_EPSILON,
        **own[kind.family](settings),
        **shared.pixel_fields(folder, PIXELS[kind.pixels]),
    )


def _fields_of_2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Vision`` in which Qwen2-VL's encoder differs from the others."""
    return dict(
        ffn_hidden_size=settings["embed_dim"] * settings["mlp_ratio"],
        activation=clip_vision.ACTIVATIONS[settings["hidden_act"]],
    )


def _fields_of_2_5(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Vision`` in which Qwen2.5-VL's encoder differs from the others."""
    return dict(
        ffn_hidden_size=settings["intermediate_size"],
        activation="swiglu",
        normalization="RMSNorm",
        window_size=settings["window_size"],
        full_attention_layers=tuple(settings["fullatt_block_indexes"]),
        tokens_per_second=settings["tokens_per_second"],
    )


def _fields_of_3(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Vision`` in which Qwen3-VL's encoder differs from the others."""
    return dict(
        ffn_hidden_size=settings["intermediate_size"],
        activation=clip_vision.ACTIVATIONS[settings["hidden_act"]],
        position_side=math.isqrt(settings["num_position_embeddings"]),
        deepstack_layers=tuple(settings["deepstack_visual_indexes"]),
    )


def problems(settings: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    """Yield settings of a vision encoder that our model does not support."""
    sizes = ["depth", kind.width, "num_heads", "patch_size", "temporal_patch_size"]
    sizes += ["spatial_merge_size", kind.output, *_SIZES[kind.family]]
    wrong = list(shared.needed_sizes(_SECTION, settings, *sizes))
    yield from wrong
    if wrong:
        return
    fixed = {"in_channels": 3, "temporal_patch_size": _FRAMES}
    yield from shared.contradictions(_SECTION, settings, fixed)
    rotation = shared.rotary_settings(settings)
    yield from shared.contradictions(f"{_SECTION}.rope_parameters", rotation, _ROTATION)
    known = ("silu",) if kind.family == "qwen2_5_vl" else tuple(clip_vision.ACTIVATIONS)
    if settings["hidden_act"] not in known:
        listed = ", ".join(known)
        yield f"{_SECTION}.hidden_act is {settings['hidden_act']!r}, must be one of {listed}"
    heads = settings["num_heads"]
    if settings[kind.width] % (4 * heads):
        yield (
            f"{_SECTION}.{kind.width} is {settings[kind.width]}, must be a multiple of 4 num_heads"
            f" = {4 * heads}: half of a head is rotated by rows, half by columns"
        )
    if kind.family == "qwen2_5_vl":
        yield from _window_problems(settings)
    if kind.family == "qwen3_vl":
        yield from _deepstack_problems(settings)


def _window_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings of windows that cannot be."""
    tile = settings["patch_size"] * settings["spatial_merge_size"]
    if settings["window_size"] < tile:
        size = settings["window_size"]
        yield f"{_SECTION}.window_size is {size}, must be at least a tile, {tile}"
    yield from _no_layers(settings, "fullatt_block_indexes")


def _deepstack_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings of learned positions and features of several layers that cannot be."""
    rows = settings["num_position_embeddings"]
    if math.isqrt(rows) ** 2 != rows:
        yield f"{_SECTION}.num_position_embeddings is {rows}, must be a square"
    name = "deepstack_visual_indexes"
    wrong = list(_no_layers(settings, name))
    yield from wrong
    layers = settings[name]
    depth = settings["depth"]
    if not wrong and list(layers) != sorted(set(layers) & set(range(depth))):
        yield (
            f"{_SECTION}.{name} is {list(layers)}, must be layers from 0 to {depth - 1}, each once,"
            " in their order"
        )


def _no_layers(settings: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield that a setting is no list of layers."""
    layers = settings.get(name)
    if not isinstance(layers, list | tuple) or not all(type(one) is int for one in layers):
        yield f"{_SECTION}.{name} is {layers!r}, must be a list of whole numbers"


def write(architecture: Architecture, kind: Kind) -> dict[str, Any]:
    """Build the section of the vision encoder."""
    own = {"qwen2_vl": _settings_of_2, "qwen2_5_vl": _settings_of_2_5, "qwen3_vl": _settings_of_3}
    vision = architecture.vision
    return {
        "model_type": f"{kind.model_type}_vision",
        "depth": vision.num_layers,
        kind.width: vision.hidden_size,
        "num_heads": vision.num_attention_heads,
        "in_channels": 3,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.grid,
        "temporal_patch_size": vision.temporal_patch_size,
        kind.output: architecture.language.hidden_size,
        **own[kind.family](vision),
    }


def _settings_of_2(vision: Vision) -> dict[str, Any]:
    """Return what ``_fields_of_2`` reads."""
    return {
        "mlp_ratio": vision.ffn_hidden_size // vision.hidden_size,
        "hidden_act": clip_vision.activation_name(vision.activation),
    }


def _settings_of_2_5(vision: Vision) -> dict[str, Any]:
    """Return what ``_fields_of_2_5`` reads."""
    return {
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": "silu",
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.full_attention_layers),
        "tokens_per_second": vision.tokens_per_second or _TOKENS_PER_SECOND,
    }


def _settings_of_3(vision: Vision) -> dict[str, Any]:
    """Return what ``_fields_of_3`` reads."""
    return {
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": clip_vision.activation_name(vision.activation),
        "num_position_embeddings": vision.position_side**2,
        "deepstack_visual_indexes": list(vision.deepstack_layers),
    }
