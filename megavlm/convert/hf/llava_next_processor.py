"""Everything in a folder of ``LlavaNextForConditionalGeneration`` but the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import llava_next_config, llava_processor
from megavlm.convert.hf.json_files import FILE_NAME, complete, read_config
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import pixel_settings
from megavlm.data.images.anyres import LLAVA_GRIDS

_PROCESSOR = "LlavaNextProcessor"
# By the kind of language model that each of the authors' templates is for.
_TEMPLATES = {"mistral": "llava_mistral", "qwen2": "llava_chatml", "qwen3": "llava_chatml"}
_USUAL = "llava_v1"


def read_usage(folder: Path) -> Usage:
    """Read how a model is to be used: the conversations of its kind of language model, and the
    grids of its config.json.
    """
    return usage_of(folder, "LlavaNextConfig")


def usage_of(folder: Path, form: str) -> Usage:
    """``read_usage`` of a class of LLaVA-NeXT's kind, whose settings are of the class ``form``."""
    path = folder / FILE_NAME
    settings = complete(form, read_config(path), path)
    template = _TEMPLATES.get(settings["text_config"]["model_type"], _USUAL)
    grids = llava_next_config.grids_of(settings)
    return without_grid(template, tiling="anyres", grids=grids)


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``LlavaNextForConditionalGeneration``
    read it; arguments and errors as of ``processor.write_native``.
    """
    grids = usage.grids or LLAVA_GRIDS
    settings = partial(llava_next_config.write, architecture, grids)
    side = architecture.vision.image_size
    made = {
        "image_processor_type": "LlavaNextImageProcessor",
        **pixel_settings(architecture),
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_pad": True,
        llava_next_config.PINPOINTS: llava_next_config.pinpoints(grids, side),
    }
    llava_processor.write_folder(
        folder, tokenizer, architecture, usage, dtype, _PROCESSOR, settings, made
    )
