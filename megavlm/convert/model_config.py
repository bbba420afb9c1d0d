"""What a model is made of, from and to the ``config.json`` of ``InternVLForConditionalGeneration``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig

from megavlm.config.schema import Architecture, Language, Vision

FILE_NAME = "config.json"
IMAGE_PROCESSOR_NAME = "preprocessor_config.json"
_ORIGINAL_FORMAT = "internvl_chat"
_NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_SOME_ARCHITECTURE = Architecture()

# What our model computes, and what a config.json must therefore say where Hugging Face knows alternatives.
_FIXED: dict[str, dict[str, Any]] = {
    "": {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"},
    "vision_config": {
        "use_qk_norm": False,
        "hidden_act": "gelu",
        "num_channels": 3,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    },
    "text_config": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False, "mlp_bias": False},
}


def architecture_from_hf(folder: str | Path) -> Architecture:
    """What the model in a Hugging Face folder is made of.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: it is of a model that ours is not; every difference is named.
    """
    path = Path(folder) / FILE_NAME
    raw = read_json(path)
    if raw.get("model_type") == _ORIGINAL_FORMAT:
        raise ValueError(f"{path}: the folder is in OpenGVLab's own format; take the model's repository whose name ends in -hf")
    if raw.get("model_type") != "internvl":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, must be 'internvl'")
    try:
        # Fills in what the file leaves out.
        settings = InternVLConfig.from_dict(raw).to_dict()
    except Exception as error:  # transformers' checks raise errors of many kinds
        raise ValueError(f"{path}: transformers cannot read it: {' '.join(str(error).split()):.300}") from None
    wrong = list(_problems(settings))
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(f"{path}: a model of another kind than those that can be trained here:\n  {listed}")
    mean, std = _normalisation(Path(folder))
    return Architecture(
        vision=_vision(settings["vision_config"], mean, std),
        language=_language(settings["text_config"]),
        pixel_shuffle=round(1 / settings["downsample_ratio"]),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as Hugging Face lays it out."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """What our model does not do."""
    vision, text = settings["vision_config"], settings["text_config"]
    for section, fixed in _FIXED.items():
        found = settings[section] if section else settings
        for name, value in fixed.items():
            if name in found and found[name] != value:
                yield f"{section}.{name}".lstrip(".") + f" is {found[name]!r}, must be {value!r}"
    if vision["norm_type"] not in _NORMS:
        yield f"vision_config.norm_type is {vision['norm_type']!r}, must be one of {', '.join(_NORMS)}"
    for name in ("image_size", "patch_size"):
        if vision[name][0] != vision[name][1]:
            yield f"vision_config.{name} is {list(vision[name])}, must be square"
    if text["model_type"] not in ("qwen2", "llama"):
        yield f"text_config.model_type is {text['model_type']!r}, must be 'qwen2' or 'llama'"
    width = text["hidden_size"] / text["num_attention_heads"]
    if text.get("head_dim") not in (None, width):
        yield f"text_config.head_dim is {text['head_dim']}, must be hidden_size / num_attention_heads = {width:g}"
    kind = _rope(text).get("rope_type", "default")
    if kind != "default":
        yield f"text_config: rotary positions are of type {kind!r}, must be 'default'"
    factor = 1 / settings["downsample_ratio"]
    if factor != round(factor):
        yield f"downsample_ratio is {settings['downsample_ratio']}, must be 1 / a whole number"


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary positions; transformers 4 keeps the base and the rest apart, 5 together."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_type": kind, "rope_theta": scaling.get("rope_theta", text.get("rope_theta", 1e4))}


def _vision(settings: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Vision:
    """The vision encoder."""
    return Vision(
        image_size=settings["image_size"][0],
        patch_size=settings["patch_size"][0],
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        normalization=_NORMS[settings["norm_type"]],
        layernorm_epsilon=settings["layer_norm_eps"],
        qkv_bias=settings["attention_bias"],
        layer_scale=settings["layer_scale_init_value"],
        pixel_mean=mean,
        pixel_std=std,
    )


def _language(settings: dict[str, Any]) -> Language:
    """The language model."""
    return Language(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_query_groups=settings["num_key_value_heads"],
        vocab_size=settings["vocab_size"],
        rotary_base=float(_rope(settings)["rope_theta"]),
        layernorm_epsilon=settings["rms_norm_eps"],
        max_position_embeddings=settings["max_position_embeddings"],
        qkv_bias=settings["model_type"] == "qwen2",
    )


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels; those of InternVL where the folder says nothing."""
    settings: dict[str, Any] = {}
    if (folder / IMAGE_PROCESSOR_NAME).is_file():
        settings = read_json(folder / IMAGE_PROCESSOR_NAME)
    elif (folder / "processor_config.json").is_file():  # transformers 5 keeps the image processor in it
        settings = read_json(folder / "processor_config.json").get("image_processor", {})
    usual = _SOME_ARCHITECTURE.vision
    return tuple(settings.get("image_mean", usual.pixel_mean)), tuple(settings.get("image_std", usual.pixel_std))


def hf_config(
    architecture: Architecture, *, dtype: torch.dtype, image_token_id: int, eos_token_id: int, pad_token_id: int
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        architecture: the model.
        dtype: number format of the weights.
        image_token_id: token that stands for an image feature.
        eos_token_id: token that ends an answer.
        pad_token_id: token that fills up texts of a batch.
    """
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": image_token_id,
        "image_seq_length": architecture.features_per_tile,
        "downsample_ratio": 1 / architecture.pixel_shuffle,
        "tie_word_embeddings": False,
        **_FIXED[""],
        "vision_config": _vision_config(architecture.vision),
        "text_config": _text_config(architecture.language, eos_token_id, pad_token_id),
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
        "norm_type": next(name for name, ours in _NORMS.items() if ours == vision.normalization),
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_bias": vision.qkv_bias,
        "layer_scale_init_value": vision.layer_scale,
    }


def _text_config(language: Language, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    # Qwen2 always has the bias; without it, the same layers are called Llama.
    kind = "qwen2" if language.qkv_bias else "llama"
    name = "Qwen2ForCausalLM" if language.qkv_bias else "LlamaForCausalLM"
    extra = {"use_sliding_window": False} if language.qkv_bias else {"attention_bias": False, "mlp_bias": False}
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        **extra,
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "vocab_size": language.vocab_size,
        "rms_norm_eps": language.layernorm_epsilon,
        "max_position_embeddings": language.max_position_embeddings,
        # The first is read by transformers 4, the second by 5.
        "rope_theta": language.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rotary_base},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


# Facts that weights of one model may be used with differently: positions are resized to the tile, the factor is only where training starts.
_FREE = {"vision.image_size", "vision.layer_scale", "language.max_position_embeddings"}


def differences(found: Architecture, wanted: Architecture) -> list[str]:
    """Facts in which ``found`` contradicts ``wanted``, such as ``--architecture.pixel_shuffle: 2 there, 4 asked for``."""

    def flat(architecture: Architecture) -> dict[str, Any]:
        facts: dict[str, Any] = {"pixel_shuffle": architecture.pixel_shuffle}
        for section in ("vision", "language"):
            facts |= {f"{section}.{name}": value for name, value in dataclasses.asdict(architecture)[section].items()}
        return facts

    ours, theirs = flat(wanted), flat(found)
    return [
        f"--architecture.{name}: {theirs[name]} there, {ours[name]} asked for"
        for name in ours
        if name not in _FREE and ours[name] != theirs[name]
    ]
