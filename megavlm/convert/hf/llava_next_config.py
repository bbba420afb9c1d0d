"""config.json of ``LlavaNextForConditionalGeneration``: LLaVA's, with the grids that images may
have, in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import llava_config
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.data.images.anyres import LLAVA_GRIDS, Grid

CLASS_NAME = "LlavaNextForConditionalGeneration"
MODEL_TYPE = "llava_next"
PINPOINTS = "image_grid_pinpoints"
_USUAL_SIDE = 336


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    settings = llava_config.complete("LlavaNextConfig", CLASS_NAME, raw, folder)
    usual = pinpoints(LLAVA_GRIDS, _USUAL_SIDE)
    return architecture_of(settings, folder, usual, has_head=has_head)


def architecture_of(
    settings: dict[str, Any], folder: Path, usual: list[list[int]], *, has_head: bool | None
) -> Architecture:
    """Return the architecture of complete settings of a class of LLaVA-NeXT's kind.

    Args:
        settings: content of config.json.
        folder: of the model.
        usual: the grids of the class's image processor, heights and widths in pixels.
        has_head: as in ``native_config``.

    Raises:
        ValueError: our model does not support them.
    """
    shared.refuse(folder / shared.FILE_NAME, list(_problems(settings)))
    shared.refuse(shared.image_processor_file(folder), list(_other_grids(settings, folder, usual)))
    found = llava_config.architecture_of(settings, folder, has_head=has_head)
    return replace(found, connector=replace(found.connector, newline=True))


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    side = settings["vision_config"].get("image_size")
    grids = settings[PINPOINTS]
    if not _are_grids(grids, side):
        yield (
            f"{PINPOINTS} is {grids}, must be multiples of vision_config.image_size {side}: pairs"
            " of height and width"
        )


def _other_grids(settings: dict[str, Any], folder: Path, usual: list[list[int]]) -> Iterator[str]:
    """Yield in what the image processor makes other grids than the model reads."""
    processor = shared.image_processor(folder)
    if processor.get("crop_size") is not None and processor.get("size") is None:
        yield "size is missing beside crop_size, must be the same, not transformers' default"
    # Where its file does not say, transformers takes the usual ones, whatever config.json says.
    grids = settings[PINPOINTS]
    if processor and processor.get(PINPOINTS, usual) != grids:
        found = processor.get(PINPOINTS, f"missing, which means {usual}")
        yield f"{PINPOINTS} is {found}, must be that of {shared.FILE_NAME}, {grids}"


def _are_grids(found: Any, side: int) -> bool:
    """Tell whether a value of JSON is a list of heights and widths in whole tiles."""
    return (
        isinstance(found, list)
        and len(found) > 0
        and all(isinstance(grid, list) and len(grid) == 2 for grid in found)
        and all(
            type(each) is int and each > 0 and each % side == 0 for grid in found for each in grid
        )
    )


def grids_of(settings: dict[str, Any]) -> tuple[Grid, ...]:
    """Return the grids of a complete config.json."""
    side = settings["vision_config"]["image_size"]
    return tuple((width // side, height // side) for height, width in settings[PINPOINTS])


def pinpoints(grids: tuple[Grid, ...], side: int) -> list[list[int]]:
    """Return grids as heights and widths in pixels, of tiles of ``side`` pixels."""
    return [[rows * side, columns * side] for columns, rows in grids]


def write(
    architecture: Architecture, grids: tuple[Grid, ...], ids: TokenIds, dtype: torch.dtype
) -> dict[str, Any]:
    """Build the content of config.json; other arguments than ``grids`` as in ``native_config``."""
    own = {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        PINPOINTS: pinpoints(grids, architecture.vision.image_size),
    }
    return llava_config.write(architecture, ids, dtype) | own
