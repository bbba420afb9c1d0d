"""Everything in a folder of BLIP-2 but the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import blip2_config, one_tile, tokenizer_files
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import tile_processor, write_generation

PROCESSOR = "Blip2Processor"
_TEMPLATE = "blip2"
_IMAGES = "BlipImageProcessor"


def read_usage(folder: Path) -> Usage:
    """Return how a model is to be used: captions behind one image, see ``usage_of``."""
    return usage_of(folder, _TEMPLATE)


def usage_of(folder: Path, template: str) -> Usage:
    """Return how a model of BLIP-2's kind is to be used: an image is stretched to a square tile, or
    becomes one as the image processor says.
    """
    return without_grid(template, tiling=one_tile.read_tiling(folder, _IMAGES))


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``Blip2ForConditionalGeneration`` read
    it; arguments and errors as of ``processor.write_native``. There is no chat template: the
    processor puts the placeholder tokens of an image before a text by itself.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    write_json(folder / FILE_NAME, blip2_config.write(architecture, ids, dtype))
    # The processor finds the placeholder token by its text; a name for it would confuse it.
    tokenizer_files.write(tokenizer, folder, {"processor_class": PROCESSOR})
    write_images(folder, architecture, usage)
    write_json(
        folder / PROCESSOR_NAME,
        {"processor_class": PROCESSOR, "num_query_tokens": architecture.placeholders_per_tile},
    )


def write_images(
    folder: Path, architecture: Architecture, usage: Usage, processor: str = PROCESSOR
) -> None:
    """Write the settings of the image processor, which makes squares of images as training did."""
    settings = tile_processor(architecture, usage, _IMAGES)
    write_json(folder / IMAGE_PROCESSOR_NAME, settings | {"processor_class": processor})
