"""config.json of BLIP-2 in transformers: ``Blip2ForConditionalGeneration``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.qformer import QFormer
from megavlm.config.schema import Architecture, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import language_config
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import written_as

CLASS_NAME = "Blip2ForConditionalGeneration"
MODEL_TYPE = "blip-2"
FORM = "Blip2Config"
VISION_TYPES = ("blip_2_vision_model", "instructblip_vision_model")
"""What config.json calls the vision encoder alone."""
WHOLE_TYPES = (MODEL_TYPE, "instructblip")
_FIXED_VISION = {"hidden_act": "gelu", "num_channels": 3}
_FIXED_QFORMER = {"hidden_act": "gelu"}
_SIZES_OF_QFORMER = (*shared.SIZES, "cross_attention_frequency")
_WITHOUT_TEXT = {"use_qformer_text_input": False}


def vision_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the vision encoder, of itself or of a whole model, with what the file
    leaves out.
    """
    found = dict(raw.get("vision_config") or {} if raw["model_type"] in WHOLE_TYPES else raw)
    found.pop("model_type", None)
    complete = shared.class_of_transformers("Blip2VisionConfig")(**found).to_dict()
    return complete | {"num_channels": found.get("num_channels", 3)}


def vision_problems(found: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield settings of the vision encoder that our model does not support."""
    yield from shared.contradictions(section, found, _FIXED_VISION)
    yield from shared.no_sizes(section, found, "image_size", "patch_size", *shared.SIZES)


def read_vision(found: Mapping[str, Any], folder: Path) -> Vision:
    """Read the vision encoder from the result of ``vision_settings``; pixels are CLIP's if the
    folder does not say.
    """
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
        **shared.pixel_fields(folder, PIXELS["clip"], found["image_size"]),
    )


def read(
    raw: dict[str, Any],
    folder: Path,
    *,
    has_head: bool | None,
    form: str = FORM,
    qformer: Mapping[str, Any] = _WITHOUT_TEXT,
) -> Architecture:
    """Read the architecture; errors and other arguments as in ``native_config``.

    Args:
        raw, folder, has_head: as there.
        form: class of the configuration in transformers.
        qformer: what it must say of the Q-Former.
    """
    settings = read_settings(raw, folder, qformer, form)
    text = settings["text_config"]
    shared.refuse(folder / shared.FILE_NAME, list(language_config.problems(text, "text_config")))
    return Architecture(
        vision=read_vision(vision_settings(raw), folder),
        language=language_config.read(
            text, tied_head=bool(text.get("tie_word_embeddings")) and not has_head
        ),
        connector=read_connector(settings),
        image_tokens="llava",
    )


def read_settings(
    raw: dict[str, Any],
    folder: Path,
    qformer: Mapping[str, Any],
    form: str = FORM,
) -> dict[str, Any]:
    """Return what config.json says, with what it leaves out.

    Args:
        raw: content of config.json.
        folder: where it is.
        qformer: what it must say of the Q-Former.
        form: class of the configuration in transformers.

    Raises:
        ValueError: it is of a model that ours is not; every difference is named.
    """
    path = folder / shared.FILE_NAME
    settings = shared.complete(form, raw, path)
    wanted = {**_FIXED_QFORMER, **qformer}
    found = settings["qformer_config"]
    wrong = [
        *vision_problems(vision_settings(raw), "vision_config"),
        *shared.contradictions("qformer_config", found, wanted),
        *shared.no_sizes("qformer_config", found, *_SIZES_OF_QFORMER),
        *shared.no_sizes("", settings, "num_query_tokens"),
    ]
    shared.refuse(path, wrong)
    return settings


def read_connector(settings: Mapping[str, Any]) -> Connector:
    """Read the Q-Former from the settings of a whole model."""
    found = settings["qformer_config"]
    qformer = QFormer(
        queries=settings["num_query_tokens"],
        num_layers=found["num_hidden_layers"],
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        cross_attention_frequency=found["cross_attention_frequency"],
        layernorm_epsilon=found["layer_norm_eps"],
        text=found.get("use_qformer_text_input", True),
        vocab_size=found["vocab_size"],
        max_position_embeddings=found["max_position_embeddings"],
    )
    return Connector(kind="qformer", qformer=qformer)


def write(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    language = architecture.language
    return write_parts(architecture) | {
        "architectures": [CLASS_NAME],
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": ids.image,
        "tie_word_embeddings": language.tied_head,
        "text_config": language_config.write(language, written_as(language, "blip2"), ids),
    }


def write_parts(architecture: Architecture) -> dict[str, Any]:
    """Build what config.json says of vision encoder and Q-Former."""
    vision = architecture.vision
    qformer = architecture.connector.qformer
    return {
        "model_type": MODEL_TYPE,
        "num_query_tokens": qformer.queries,
        "vision_config": {
            "model_type": VISION_TYPES[0],
            **_FIXED_VISION,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_hidden_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_attention_heads": vision.num_attention_heads,
            "layer_norm_eps": vision.layernorm_epsilon,
            "qkv_bias": vision.qkv_bias,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **_FIXED_QFORMER,
            "num_hidden_layers": qformer.num_layers,
            "hidden_size": qformer.hidden_size,
            "intermediate_size": qformer.ffn_hidden_size,
            "num_attention_heads": qformer.num_attention_heads,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "layer_norm_eps": qformer.layernorm_epsilon,
            "encoder_hidden_size": vision.hidden_size,
            "use_qformer_text_input": qformer.text,
            "vocab_size": qformer.vocab_size,
            "max_position_embeddings": qformer.max_position_embeddings,
        },
    }
