"""config.json of ``LlavaOnevisionForConditionalGeneration``: LLaVA-NeXT's, with larger grids of
which features are made fewer, and a token for videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.config.tiling import BOUNDED
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import llava_config, llava_next_config
from megavlm.convert.hf.llava_next_config import PINPOINTS, pinpoints
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.data.images.anyres import ONEVISION_GRIDS, Grid

CLASS_NAME = "LlavaOnevisionForConditionalGeneration"
MODEL_TYPE = "llava_onevision"
SETTINGS = "LlavaOnevisionConfig"
_USUAL_SIDE = 384


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    settings = llava_config.complete(SETTINGS, CLASS_NAME, raw, folder)
    wanted = {"vision_aspect_ratio": BOUNDED}
    shared.refuse(folder / shared.FILE_NAME, list(shared.contradictions("", settings, wanted)))
    usual = pinpoints(ONEVISION_GRIDS, _USUAL_SIDE)
    return llava_next_config.architecture_of(settings, folder, usual, has_head=has_head)


def write(
    architecture: Architecture,
    grids: tuple[Grid, ...],
    video: int,
    ids: TokenIds,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Build the content of config.json.

    Args:
        grids: that images may have.
        video: id of the token for videos; -1: the tokenizer has none.
        architecture, ids, dtype: as in ``native_config``.
    """
    own = {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        PINPOINTS: pinpoints(grids, architecture.vision.image_size),
        "vision_aspect_ratio": BOUNDED,
        "video_token_index": video,
    }
    settings = llava_config.write(architecture, ids, dtype) | own
    del settings["image_seq_length"]
    return settings
