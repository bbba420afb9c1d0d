"""Everything in a folder of ``PaliGemmaForConditionalGeneration`` but the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.exports import PALIGEMMA_FAMILIES
from megavlm.config.schema import Architecture
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision, language_config, one_tile, tokenizer_files
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import tile_processor, write_generation
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import written_as
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS

CLASS_NAME = "PaliGemmaForConditionalGeneration"
MODEL_TYPE = "paligemma"
_PROCESSOR = "PaliGemmaProcessor"
_IMAGES = "SiglipImageProcessor"
_VISION = {"model_type": "siglip_vision_model", "num_channels": 3, "vision_use_head": False}
# The class sets it, so that the tokens of a prefix see each other; the language model alone is
# causal.
_BIDIRECTIONAL = "use_bidirectional_attention"


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    path = folder / FILE_NAME
    settings = shared.complete("PaliGemmaConfig", raw, path)
    text = settings["text_config"]
    vision = settings["vision_config"]
    shared.refuse(path, list(_problems(settings)))
    return Architecture(
        vision=clip_vision.read(
            vision,
            family="siglip",
            pixels=shared.pixel_fields(folder, PIXELS["siglip"], vision["image_size"]),
            final_norm=True,
        ),
        connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
        language=language_config.read(
            text, tied_head=settings["tie_word_embeddings"] and not has_head
        ),
        image_tokens="paligemma",
        prefix_lm=True,
    )


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    vision = settings["vision_config"]
    text = dict(settings["text_config"])
    yield from shared.contradictions("vision_config", vision, _VISION)
    yield from clip_vision.problems(vision, "vision_config")
    if text.pop(_BIDIRECTIONAL, True) is False:
        yield f"text_config.{_BIDIRECTIONAL} is False, must be True: prefixes are bidirectional"
    if text.get("model_type") not in PALIGEMMA_FAMILIES:
        yield (
            f"text_config.model_type is {text.get('model_type')!r}, must be 'gemma' (PaliGemma) or"
            " 'gemma2' (PaliGemma 2)"
        )
        return
    yield from language_config.problems(text, "text_config")
    if settings["image_token_index"] >= text["vocab_size"]:
        yield (
            f"image_token_index is {settings['image_token_index']}, and text_config.vocab_size is"
            f" {text['vocab_size']}: the token embedding must have a row for it"
        )


def read_usage(folder: Path) -> Usage:
    """Read how a model is to be used: one question, and images stretched to squares, or as the
    image processor says.
    """
    return without_grid("paligemma", tiling=one_tile.read_tiling(folder, _IMAGES))


def write(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    language = architecture.language
    text = language_config.write(language, written_as(language, "paligemma"), ids)
    return {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": ids.image,
        "projection_dim": language.hidden_size,
        "hidden_size": language.hidden_size,
        "vocab_size": language.vocab_size,
        **ids.text,
        "tie_word_embeddings": language.tied_head,
        "vision_config": {
            **_VISION,
            **clip_vision.write(architecture.vision),
            "num_image_tokens": architecture.placeholders_per_tile,
            "projection_dim": language.hidden_size,
        },
        "text_config": text
        | {_BIDIRECTIONAL: True, "num_image_tokens": architecture.placeholders_per_tile},
    }


def write_files(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and the class read it; arguments and
    errors as of ``processor.write_native``. There is no chat template: the processor itself puts
    prompts together.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    write_json(folder / FILE_NAME, write(architecture, ids, dtype))
    context = IMAGE_TOKEN_SETS[architecture.image_tokens].context
    entries = {
        "extra_special_tokens": {"image_token": context},
        "processor_class": _PROCESSOR,
    }
    tokenizer_files.write(tokenizer, folder, entries)
    image_processor = {
        **tile_processor(architecture, usage, _IMAGES),
        "processor_class": _PROCESSOR,
        "image_seq_length": architecture.placeholders_per_tile,
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)
    write_json(folder / PROCESSOR_NAME, {"processor_class": _PROCESSOR})
