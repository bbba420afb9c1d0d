"""config.json of ``InternVLForConditionalGeneration``, the native dialect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture, Connector, Vision
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import language_config
from megavlm.convert.hf.json_files import NORMS
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import written_as

CLASS_NAME = "InternVLForConditionalGeneration"
MODEL_TYPE = "internvl"
# transformers normalises InternViT-6B's queries and keys with this, whatever config.json says.
_QK_NORM_EPSILON = 1e-6

# What our model computes, and what a config.json must therefore say where Hugging Face knows
# alternatives.
_FIXED: dict[str, dict[str, Any]] = {
    "": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_act": "gelu",
        "num_channels": 3,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    },
}


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture.

    Args:
        raw: content of its config.json.
        folder: where it is.
        has_head: whether the weights have a head of their own; none: there are no weights to look
            at.

    Raises:
        ValueError: it is of a model that ours is not; every difference is named.
    """
    path = folder / shared.FILE_NAME
    settings = shared.complete("InternVLConfig", raw, path)
    shared.refuse(path, list(_problems(settings)))
    return Architecture(
        vision=_vision(settings["vision_config"], folder),
        language=language_config.read_bare(
            settings["text_config"], tied_head=settings["tie_word_embeddings"] and not has_head
        ),
        connector=Connector(pixel_shuffle=shared.whole_inverse(settings["downsample_ratio"])),
    )


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    vision = settings["vision_config"]
    text = settings["text_config"]
    for section, fixed in _FIXED.items():
        yield from shared.contradictions(section, settings[section] if section else settings, fixed)
    if vision["norm_type"] not in NORMS:
        yield (
            f"vision_config.norm_type is {vision['norm_type']!r}, must be one of {', '.join(NORMS)}"
        )
    yield from shared.needed_sizes("vision_config", vision, *shared.SIZES)
    for name in ("image_size", "patch_size"):
        if len(vision[name]) != 2 or vision[name][0] != vision[name][1]:
            yield f"vision_config.{name} is {list(vision[name])}, must be square"
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != _QK_NORM_EPSILON:
        yield (
            f"vision_config.layer_norm_eps is {vision['layer_norm_eps']}, must be"
            f" {_QK_NORM_EPSILON} beside use_qk_norm"
        )
    yield from language_config.problems(text, "text_config")
    if not shared.whole_inverse(settings["downsample_ratio"]):
        yield f"downsample_ratio is {settings['downsample_ratio']}, must be 1 / a whole number"


def _vision(settings: dict[str, Any], folder: Path) -> Vision:
    """Read the vision encoder."""
    side = settings["image_size"][0]
    return Vision(
        image_size=side,
        patch_size=settings["patch_size"][0],
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        normalization=NORMS[settings["norm_type"]],
        layernorm_epsilon=settings["layer_norm_eps"],
        qkv_bias=settings["attention_bias"],
        qk_norm=settings["use_qk_norm"],
        layer_scale=settings["layer_scale_init_value"],
        **shared.pixel_fields(folder, side=side),
    )


def write(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json.

    Args:
        architecture: the model.
        ids: of the tokens that it names.
        dtype: dtype of the weights.

    Raises:
        ValueError: transformers has no such model.
    """
    vision = architecture.vision
    language = architecture.language
    if vision.qk_norm and vision.layernorm_epsilon != _QK_NORM_EPSILON:
        raise ValueError(
            f"--architecture.vision.layernorm_epsilon {vision.layernorm_epsilon}: transformers"
            f" normalises InternViT's queries and keys with {_QK_NORM_EPSILON} only; use the chat"
            " dialect"
        )
    return {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": ids.image,
        "image_seq_length": architecture.placeholders_per_tile,
        "downsample_ratio": 1 / architecture.connector.pixel_shuffle,
        "tie_word_embeddings": language.tied_head,
        **_FIXED[""],
        "vision_config": _vision_config(vision),
        "text_config": language_config.write(language, written_as(language, "native"), ids),
    }


def _vision_config(vision: Vision) -> dict[str, Any]:
    return {
        "model_type": "internvl_vision",
        **_FIXED["vision_config"],
        "image_size": [vision.image_size, vision.image_size],
        "patch_size": [vision.patch_size, vision.patch_size],
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "norm_type": shared.name_of(vision.normalization, NORMS),
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm,
        "layer_scale_init_value": vision.layer_scale,
    }
