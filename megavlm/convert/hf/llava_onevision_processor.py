"""Everything in a folder of ``LlavaOnevisionForConditionalGeneration`` but the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megavlm.config.schema import Architecture
from megavlm.config.tiling import BOUNDED
from megavlm.convert.hf import (
    llava_config,
    llava_next_processor,
    llava_onevision_config,
    llava_processor,
)
from megavlm.convert.hf.json_files import VIDEO_PROCESSOR_NAME, write_json
from megavlm.convert.hf.llava_next_config import PINPOINTS, pinpoints
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.processor import pixel_settings
from megavlm.data.images.anyres import ONEVISION_GRIDS
from megavlm.data.text.tokenizer import (
    IMAGE_TOKEN_SETS,
    VIDEO_TOKENS,
    load_tokenizer,
    video_token,
)

_PROCESSOR = "LlavaOnevisionProcessor"


def read_usage(folder: Path) -> Usage:
    """Read how a model is to be used: as a LLaVA-NeXT, with the larger grids."""
    found = llava_next_processor.usage_of(folder, llava_onevision_config.SETTINGS)
    return replace(found, tiling=BOUNDED)


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and
    ``LlavaOnevisionForConditionalGeneration`` read it; arguments and errors as of
    ``processor.write_native``.
    """
    grids = usage.grids or ONEVISION_GRIDS
    words = load_tokenizer(tokenizer)
    # Packs have no token of videos, so a tokenizer may lack it.
    video = video_token(words)
    video_id = words.convert_tokens_to_ids(video) if video else -1
    vision = architecture.vision
    side = vision.image_size
    pixels = {**pixel_settings(architecture), "size": {"height": side, "width": side}}
    image_processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        **pixels,
        "do_pad": True,
        PINPOINTS: pinpoints(grids, side),
    }
    processor = {
        "num_image_tokens": architecture.placeholders_per_tile + vision.has_class_token,
        "vision_feature_select_strategy": llava_config.select_strategy(vision),
        "image_token": IMAGE_TOKEN_SETS[architecture.image_tokens].context,
        "video_token": video or VIDEO_TOKENS[0],
        "vision_aspect_ratio": BOUNDED,
    }
    llava_processor.write_folder(
        folder,
        tokenizer,
        architecture,
        usage,
        dtype,
        _PROCESSOR,
        partial(llava_onevision_config.write, architecture, grids, video_id),
        image_processor,
        processor,
    )
    video_processor = {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": _PROCESSOR,
        **pixels,
    }
    write_json(folder / VIDEO_PROCESSOR_NAME, video_processor)
