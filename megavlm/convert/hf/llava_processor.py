"""Everything in a folder of ``LlavaForConditionalGeneration`` but the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import llava_config, one_tile, tokenizer_files
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    read_json,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import chat_template, tile_processor, write_generation
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer

_PROCESSOR = "LlavaProcessor"
_TEMPLATE = "llava_v1"
# By the family of the vision encoder: the image processor that makes a square of the whole image.
_STRETCHING = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}


def read_usage(folder: Path) -> Usage:
    """Read how a model is to be used: LLaVA 1.5's conversations, and one tile an image, made as the
    image processor says, or as usual for the model's vision encoder.
    """
    vision = read_json(folder / FILE_NAME).get("vision_config") or {}
    tiling = one_tile.read_tiling(folder, vision.get("model_type") or "clip")
    return without_grid(_TEMPLATE, tiling=tiling)


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``LlavaForConditionalGeneration`` read
    it; arguments and errors as of ``processor.write_native``.
    """
    image_processor = _image_processor(architecture, usage)
    settings = partial(llava_config.write, architecture)
    write_folder(
        folder, tokenizer, architecture, usage, dtype, _PROCESSOR, settings, image_processor
    )


def write_folder(
    folder: Path,
    tokenizer: Path,
    architecture: Architecture,
    usage: Usage,
    dtype: torch.dtype,
    kind: str,
    settings: Callable[[TokenIds, torch.dtype], dict[str, Any]],
    image_processor: dict[str, Any],
    processor: dict[str, Any] | None = None,
) -> None:
    """Write everything but weights of a class of LLaVA's kind.

    Args:
        folder, tokenizer, architecture, usage, dtype: as of ``processor.write_native``.
        kind: class of the processor.
        settings: makes the content of config.json, of ids of tokens and the dtype of weights.
        image_processor: settings of the image processor.
        processor: settings of the processor; none: LLaVA's.
    """
    markers = FORMATS[usage.template].markers if usage.template in FORMATS else ()
    if not usage.is_trained and not set(markers) <= load_tokenizer(tokenizer).get_vocab().keys():
        # Imported with a language model that ends answers otherwise; its chat template is kept.
        usage = replace(usage, template="")
    ids = write_generation(folder, tokenizer, architecture, usage)
    context = IMAGE_TOKEN_SETS[architecture.image_tokens].context
    write_json(folder / FILE_NAME, settings(ids, dtype))
    entries = {
        "extra_special_tokens": {"image_token": context},
        "processor_class": kind,
    }
    tokenizer_files.write(tokenizer, folder, entries)
    template = chat_template(tokenizer, usage, with_images=True, image=context)
    if template is not None:
        (folder / tokenizer_files.TEMPLATE_NAME).write_text(template, encoding="utf-8")
    write_json(folder / IMAGE_PROCESSOR_NAME, {"processor_class": kind, **image_processor})
    usual = {
        "patch_size": architecture.vision.patch_size,
        "vision_feature_select_strategy": llava_config.select_strategy(architecture.vision),
        "image_token": context,
        "num_additional_image_tokens": int(architecture.vision.has_class_token),
    }
    write_json(folder / PROCESSOR_NAME, {"processor_class": kind, **(processor or usual)})


def _image_processor(architecture: Architecture, usage: Usage) -> dict[str, Any]:
    """Return the settings of the image processor. ``LlavaProcessor`` looks for the number of image
    tokens in ``crop_size``, also if nothing is cropped.
    """
    side = architecture.vision.image_size
    kind = _STRETCHING[architecture.vision.family]
    return {
        "crop_size": {"height": side, "width": side},
        **tile_processor(architecture, usage, kind),
    }
