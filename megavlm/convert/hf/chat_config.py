"""config.json of ``InternVLChatModel``, the chat dialect: the format in which OpenGVLab publishes
InternVL 2.0 to 3.5.

The model's own Python files are part of OpenGVLab's repositories. They are never read here, nor
written: ``auto_map`` of a folder that is written names the repository that holds those of its
language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture, Connector, Vision
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import language_config
from megavlm.convert.hf.json_files import NORMS
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.token_ids import TextIds
from megavlm.convert.weights.families import written_as
from megavlm.data.text.templates import FORMATS

CLASS_NAME = "InternVLChatModel"
MODEL_TYPE = "internvl_chat"
# Repositories of OpenGVLab whose Python files know a family; the first one for every family that is
# not named.
_CODE = {
    "": "OpenGVLab/InternVL2_5-1B",
    "qwen3": "OpenGVLab/InternVL3_5-1B",
    "qwen3_moe": "OpenGVLab/InternVL3_5-30B-A3B",
    "gpt_oss": "OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview",
    "internlm3": "OpenGVLab/InternVL3-9B",
    "phi3": "OpenGVLab/InternVL2-4B",
}

# What our model computes, and what a config.json must therefore say where OpenGVLab's code knows
# alternatives.
_FIXED: dict[str, dict[str, Any]] = {
    "": {"select_layer": -1, "ps_version": "v2", "use_backbone_lora": 0, "use_llm_lora": 0},
    "vision_config": {"hidden_act": "gelu", "num_channels": 3},
}
# Conversation templates that OpenGVLab's classes know, and those that the class of one family knows
# beside them.
_TEMPLATES = ("internvl2_5", "Hermes-2", "internlm2-chat", "phi3-chat")
_TEMPLATES_OF = {"gpt_oss": ("internvl3_5_gpt_oss",)}
_SIZES_OF_VISION = ("image_size", "patch_size", *shared.SIZES)
_FLAGS_OF_VISION = ("qkv_bias", "qk_normalization")
_NEEDED_OF_VISION = (*_SIZES_OF_VISION, *_FLAGS_OF_VISION, "norm_type", "layer_norm_eps")


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in the native dialect."""
    path = folder / shared.FILE_NAME
    shared.refuse(path, list(_problems(raw)))
    language = shared.completed(raw["llm_config"], path)
    shared.refuse(path, list(language_config.problems(language, "llm_config")))
    vision = raw["vision_config"]
    says_tied = bool(raw.get("tie_word_embeddings", language.get("tie_word_embeddings", False)))
    return Architecture(
        vision=read_vision(vision, shared.pixel_fields(folder)),
        language=language_config.read(language, tied_head=says_tied and not has_head),
        connector=Connector(pixel_shuffle=shared.whole_inverse(raw["downsample_ratio"])),
    )


def _problems(raw: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support, and settings that the file lacks."""
    yield from shared.contradictions("", raw, _FIXED[""])
    if "ps_version" not in raw:
        yield "ps_version is missing, which means 'v1'; must be 'v2'"
    ratio = raw.get("downsample_ratio")
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1 or not shared.whole_inverse(ratio):
        yield f"downsample_ratio is {ratio!r}, must be 1 / a whole number"
    vision = raw.get("vision_config")
    language = raw.get("llm_config")
    if isinstance(vision, dict):
        yield from vision_problems(vision, "vision_config")
        side = vision.get("image_size")
        if raw.get("force_image_size") not in (None, side):
            yield (
                f"force_image_size is {raw['force_image_size']}, and vision_config.image_size is"
                f" {side}; resize the position embeddings and set both to one value"
            )
    else:
        yield "vision_config is missing"
    if isinstance(language, dict):
        yield from language_config.problems(language, "llm_config")
    else:
        yield "llm_config is missing"


def vision_problems(vision: dict[str, Any], section: str) -> Iterator[str]:
    """Why a vision encoder is none that can be trained here; ``section`` is the name of its
    settings in the file.
    """
    yield from shared.missing(section, vision, *_NEEDED_OF_VISION)
    yield from shared.no_sizes(section, vision, *_SIZES_OF_VISION)
    yield from shared.no_positive_numbers(section, vision, "layer_norm_eps", "initializer_factor")
    yield from shared.no_flags(section, vision, *_FLAGS_OF_VISION)
    yield from shared.contradictions(section, vision, _FIXED["vision_config"])
    if vision.get("norm_type") not in (None, *NORMS):
        name = f"{section}.norm_type".lstrip(".")
        yield f"{name} is {vision['norm_type']!r}, must be one of {', '.join(NORMS)}"


def read_vision(settings: dict[str, Any], pixels: dict[str, Any]) -> Vision:
    """Read the vision encoder; ``pixels`` as of ``json_files.pixel_fields``."""
    return Vision(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        normalization=NORMS[settings["norm_type"]],
        layernorm_epsilon=settings["layer_norm_eps"],
        qkv_bias=settings["qkv_bias"],
        qk_norm=settings["qk_normalization"],
        layer_scale=settings.get("initializer_factor") or 0.1,
        **pixels,
    )


def write(
    architecture: Architecture, ids: TextIds, dtype: torch.dtype, usage: Usage
) -> dict[str, Any]:
    """Return the content of config.json.

    A tied head is written as a tensor of its own: the class of InternVL 2 and 3 unties every model.

    Args:
        architecture: the model.
        ids: of the tokens of the language model.
        dtype: of the weights.
        usage: its template and tile limits. The class of InternVL 3.5 takes the template's own
            system message, whatever this says.

    Raises:
        ValueError: the class does not know the template.
    """
    vision = architecture.vision
    language = architecture.language
    family = written_as(language, "chat")
    _refuse_template(usage.template, family.name)
    number = str(dtype).removeprefix("torch.")
    return {
        "architectures": [CLASS_NAME],
        "auto_map": _auto_map(family.name),
        "model_type": MODEL_TYPE,
        "torch_dtype": number,
        "downsample_ratio": 1 / architecture.connector.pixel_shuffle,
        "dynamic_image_size": usage.crops,
        "force_image_size": vision.image_size,
        "min_dynamic_patch": usage.min_tiles,
        "max_dynamic_patch": usage.max_tiles,
        "use_thumbnail": usage.thumbnail,
        "pad2square": usage.tiling == "pad",
        **_FIXED[""],
        "template": usage.template,
        "system_message": usage.system_message,
        "tie_word_embeddings": False,
        "vision_config": vision_config(vision) | {"torch_dtype": number},
        "llm_config": language_config.write(language, family, ids)
        # No attn_implementation: the class chooses FlashAttention itself if it is installed, and
        # transformers refuses a model that names it where it is not.
        | {"tie_word_embeddings": False, "use_cache": True, "torch_dtype": number},
    }


def _refuse_template(template: str, family: str) -> None:
    """Raise ValueError for one of our templates that the class of a family does not know."""
    known = _TEMPLATES + _TEMPLATES_OF.get(family, ())
    if template in FORMATS and template not in known:
        raise ValueError(
            f"--dialect chat: InternVLChatModel has no template {template!r}, only"
            f" {', '.join(known)}; use --dialect native"
        )


def _auto_map(family: str) -> dict[str, str]:
    """Return the entry that says which repository holds the class's Python files."""
    code = _CODE.get(family, _CODE[""])
    return {
        "AutoConfig": f"{code}--configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": f"{code}--modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": f"{code}--modeling_internvl_chat.InternVLChatModel",
    }


def vision_config(vision: Vision) -> dict[str, Any]:
    """Return the vision encoder's part of config.json."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **_FIXED["vision_config"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "norm_type": shared.name_of(vision.normalization, NORMS),
        "layer_norm_eps": vision.layernorm_epsilon,
        "qkv_bias": vision.qkv_bias,
        "qk_normalization": vision.qk_norm,
        "initializer_factor": vision.layer_scale,
        "use_flash_attn": True,
    }
