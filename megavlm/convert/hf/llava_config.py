"""config.json of ``LlavaForConditionalGeneration``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import LLAVA, Connector
from megavlm.config.schema import Architecture, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision, language_config
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import written_as

CLASS_NAME = "LlavaForConditionalGeneration"
MODEL_TYPE = "llava"
# By the activation between the two linear layers that files always have.
_CONNECTORS = {"gelu": LLAVA, "linear": Connector(kind="linear", pixel_shuffle=1, norm=False)}
# By the kind of vision encoder: its family.
FAMILIES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    settings = complete("LlavaConfig", CLASS_NAME, raw, folder)
    return architecture_of(settings, folder, has_head=has_head)


def complete(form: str, class_name: str, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with what the file leaves out.

    Args:
        form: class of the settings.
        class_name: class of the model.
        raw: content of the file.
        folder: of the model.

    Raises:
        ValueError: our model does not support them.
    """
    path = folder / shared.FILE_NAME
    if "text_config" not in raw:
        raise ValueError(
            f"{path}: has no text_config; it is of LLaVA's own code, and only folders of"
            f" transformers' {class_name} are read"
        )
    settings = shared.complete(form, raw, path)
    shared.refuse(path, list(_problems(settings)))
    return settings


def architecture_of(
    settings: dict[str, Any], folder: Path, *, has_head: bool | None
) -> Architecture:
    """Return the architecture of complete settings; arguments as in ``native_config``."""
    vision = settings["vision_config"]
    family = FAMILIES[vision["model_type"]]
    connector = _CONNECTORS[settings["projector_hidden_act"]]
    tied = settings["tie_word_embeddings"] or settings["text_config"].get("tie_word_embeddings")
    return Architecture(
        vision=clip_vision.read(
            vision,
            family=family,
            pixels=shared.pixel_fields(folder, PIXELS[family], vision["image_size"]),
            unused_layers=vision["num_hidden_layers"]
            - _layers(vision, settings["vision_feature_layer"]),
            unused_head=family == "siglip" and vision.get("vision_use_head", True),
        ),
        language=language_config.read_bare(
            settings["text_config"], tied_head=bool(tied) and not has_head
        ),
        connector=replace(connector, bias=settings["multimodal_projector_bias"]),
        image_tokens="llava",
    )


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    vision = settings["vision_config"]
    family = FAMILIES.get(vision.get("model_type"))
    if family is None:
        yield (
            f"vision_config.model_type is {vision.get('model_type')!r}, must be one of"
            f" {', '.join(FAMILIES)}"
        )
    else:
        chosen = {"vision_feature_select_strategy": select_strategy(Vision(family=family))}
        yield from shared.contradictions("", settings, chosen)
        yield from shared.contradictions("vision_config", vision, {"num_channels": 3})
        yield from clip_vision.problems(vision, "vision_config")
    if settings["projector_hidden_act"] not in _CONNECTORS:
        yield (
            f"projector_hidden_act is {settings['projector_hidden_act']!r}, must be one of"
            f" {', '.join(_CONNECTORS)}"
        )
    layer = settings["vision_feature_layer"]
    if not isinstance(layer, int):
        yield f"vision_feature_layer is {layer}, must be one layer"
    elif not 1 <= _layers(vision, layer) <= vision["num_hidden_layers"]:
        yield (
            f"vision_feature_layer is {layer}, must be one of the"
            f" {vision['num_hidden_layers']} layers of vision_config"
        )
    yield from language_config.problems(settings["text_config"], "text_config")


def _layers(vision: dict[str, Any], feature_layer: int) -> int:
    """Count the layers that features go through. ``feature_layer`` is an entry of a list that the
    embeddings begin and the last layer ends.
    """
    below_zero = vision["num_hidden_layers"] + 1 if feature_layer < 0 else 0
    return feature_layer + below_zero


def select_strategy(vision: Vision) -> str:
    """Return what transformers calls the features of a tile that the connector reads: all of them,
    or all but that of the class token.
    """
    return "default" if vision.has_class_token else "full"


def write(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    vision = architecture.vision
    language = architecture.language
    kind = architecture.connector.kind
    return {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": ids.image,
        "image_seq_length": architecture.placeholders_per_tile,
        "projector_hidden_act": next(
            name for name, settings in _CONNECTORS.items() if settings.kind == kind
        ),
        "vision_feature_layer": -1 - vision.unused_layers,
        "pad_token_id": ids.pad,
        "tie_word_embeddings": language.tied_head,
        "vision_feature_select_strategy": select_strategy(vision),
        "multimodal_projector_bias": architecture.connector.bias,
        "vision_config": _vision(vision),
        "text_config": language_config.write(language, written_as(language, "llava"), ids),
    }


def _vision(vision: Vision) -> dict[str, Any]:
    """Build the section of the vision encoder; each family has one setting of its own."""
    own = {
        "clip": {"projection_dim": vision.hidden_size},
        "siglip": {"vision_use_head": vision.unused_head},
    }
    return {
        "model_type": shared.name_of(vision.family, FAMILIES),
        "num_channels": 3,
        **clip_vision.write(vision),
        **own[vision.family],
    }
