"""Folders of ``Blip2ForImageTextRetrieval``: BLIP-2's first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.config.image_text import ImageText
from megavlm.config.schema import NO_LANGUAGE, Architecture
from megavlm.convert.hf import blip2_config, tokenizer_files
from megavlm.convert.hf.blip2_processor import PROCESSOR, usage_of, write_images
from megavlm.convert.hf.json_files import FILE_NAME, PROCESSOR_NAME, write_json
from megavlm.convert.hf.preprocessing import Usage

CLASS_NAME = "Blip2ForImageTextRetrieval"


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``. How long texts are and
    how losses are weighed stands in no file.
    """
    settings = blip2_config.read_settings(raw, folder, {"use_qformer_text_input": True})
    return Architecture(
        objective="qformer",
        vision=blip2_config.read_vision(blip2_config.vision_settings(raw), folder),
        language=NO_LANGUAGE,
        connector=blip2_config.read_connector(settings),
        image_text=ImageText(size=settings["image_text_hidden_size"]),
    )


def read_usage(folder: Path) -> Usage:
    """Return how a model sees pairs, see ``blip2_processor.usage_of``."""
    return usage_of(folder, "blip2_pairs")


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``Blip2ForImageTextRetrieval`` read
    it; see ``processor.write_native``.
    """
    settings = blip2_config.write_parts(architecture) | {
        "architectures": [CLASS_NAME],
        "dtype": str(dtype).removeprefix("torch."),
        "image_text_hidden_size": architecture.image_text.size,
    }
    write_json(folder / FILE_NAME, settings)
    write_images(folder, architecture, usage)
    # Texts have no placeholder tokens, so no number of them is told.
    write_json(folder / PROCESSOR_NAME, {"processor_class": PROCESSOR})
    tokenizer_files.copy(tokenizer, folder)
