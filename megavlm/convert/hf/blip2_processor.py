"""Everything in a folder of BLIP-2 but the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import blip2_config, tokenizer_files
from megavlm.convert.hf.json_files import FILE_NAME, IMAGE_PROCESSOR_NAME, write_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.processor import pixel_settings, write_generation

PROCESSOR = "Blip2Processor"
_TEMPLATE = "blip2"


def read_usage(folder: Path) -> Usage:
    """Return how a model is to be used: captions behind one image, which is stretched to a square
    tile.
    """
    return Usage(
        template=_TEMPLATE, system_message="", max_tiles=1, thumbnail=False, tiling="stretch"
    )


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``Blip2ForConditionalGeneration`` read
    it; arguments and errors as of ``processor.write_native``. There is no chat template: the
    processor puts the placeholder tokens of an image before a text by itself.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    settings = blip2_config.write(architecture, dtype=dtype, image_token_id=ids.image, **ids.text)
    write_json(folder / FILE_NAME, settings)
    # The processor finds the placeholder token by its text; a name for it would confuse it.
    tokenizer_files.write(tokenizer, folder, {"processor_class": PROCESSOR})
    write_images(folder, architecture)
    write_json(
        folder / "processor_config.json",
        {"processor_class": PROCESSOR, "num_query_tokens": architecture.placeholders_per_tile},
    )


def write_images(folder: Path, architecture: Architecture, processor: str = PROCESSOR) -> None:
    """Write the settings of the image processor, which stretches images to squares."""
    side = architecture.vision.image_size
    settings: dict[str, Any] = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        **pixel_settings(architecture),
        "size": {"height": side, "width": side},
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, settings)
