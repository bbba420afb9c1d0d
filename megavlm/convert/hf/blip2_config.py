"""config.json of BLIP-2 in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Blip2VisionConfig

from megavlm.config.schema import Vision
from megavlm.convert.hf.json_files import contradictions

VISION_TYPES = ("blip_2_vision_model", "instructblip_vision_model")
"""What config.json calls the vision encoder alone."""
WHOLE_TYPES = ("blip-2", "instructblip")
_FIXED_VISION = {"hidden_act": "gelu", "num_channels": 3}


def vision_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the vision encoder, of itself or of a whole model, with what the file
    leaves out.
    """
    found = dict(raw.get("vision_config", {}) if raw["model_type"] in WHOLE_TYPES else raw)
    found.pop("model_type", None)
    return Blip2VisionConfig(**found).to_dict() | {"num_channels": found.get("num_channels", 3)}


def vision_problems(found: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield settings of the vision encoder that our model does not support."""
    yield from contradictions(section, found, _FIXED_VISION)


def read_vision(
    found: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> Vision:
    """Read the vision encoder from the result of ``vision_settings``."""
    return Vision(
        family="eva",
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        num_layers=found["num_hidden_layers"],
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        layernorm_epsilon=found["layer_norm_eps"],
        qkv_bias=found["qkv_bias"],
        pixel_mean=mean,
        pixel_std=std,
    )
