"""The settings of the video processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, from and to bounds of
the frames of videos.

``Qwen2VLVideoProcessor`` bounds the pixels of a frame, and shares out 90% of ``max_video_tokens``
among the pairs. ``Qwen3VLVideoProcessor`` bounds the pixels of all frames together, and takes
``max_video_tokens`` tiles a frame at most. Both share out pixels if ``cap_pixels_per_frame`` is
true, which is written; a folder that does not say is read so, since the authors' qwen-vl-utils does
it. What differs from ``data/images/native``, which has the rule of that package: an odd number of
frames is shared out as it is; and Qwen3-VL's fewest pixels are those of all frames, in tiles that a
frame has at least one of, so frames of a video may be smaller than packs have them if more than a
tile is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.config.schema import Architecture
from megavlm.config.tiling import UNBOUNDED, VideoPixels
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.json_files import VIDEO_PROCESSOR_NAME
from megavlm.convert.hf.processor import pixel_settings
from megavlm.convert.hf.qwen_vl_kinds import Kind
from megavlm.data.images.native import FRAME_TILES, PAIR, VIDEO_SHARE

# What the settings call the fewest and the most pixels, as of 2025 and before.
BOUNDS = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
# How files of videos are read: as the packer reads them unless it is told otherwise.
_SAMPLING = {"do_sample_frames": True, "fps": 2, "min_frames": 4, "max_frames": 768}
_TOKENS = "max_video_tokens"
_CAP = "cap_pixels_per_frame"
# By classes: sides of the tiles of their own bounds, and max_video_tokens.
_OF_CLASS = {False: (28, 128_000), True: (32, FRAME_TILES[1])}


def read(folder: Path, tile: int, kind: Kind) -> VideoPixels:
    """Read the bounds of a folder; ``UNBOUNDED`` if it states none. Raises ValueError: they cannot
    be.

    Args:
        folder: of the model.
        tile: side of a tile in pixels.
        kind: of the model.
    """
    found, path = _settings(folder)
    size = found.get("size") or {}
    if not isinstance(size, Mapping):
        shared.refuse(path, [f"size is {size!r}, must be an object"])
    names = [name for pair in BOUNDS for name in pair]
    wrong = [*shared.no_sizes("size", size, *names), *shared.no_sizes("", found, *names, _TOKENS)]
    shared.refuse(path, [*wrong, *shared.no_flags("", found, _CAP)])
    stated = [found.get(old) or size.get(new) or size.get(old) for new, old in BOUNDS]
    if not any(stated):
        return UNBOUNDED
    side, tokens = _OF_CLASS[kind.is_third]
    least, most = (
        value or count * side**2 for value, count in zip(stated, FRAME_TILES, strict=True)
    )
    tokens = found.get(_TOKENS) or tokens
    bounds = _of_third if kind.is_third else _of_others
    pixels = bounds(least, most, tokens, tile**2, is_shared=found.get(_CAP) is not False)
    if not pixels.least <= pixels.most or pixels.total < tile**2:
        shared.refuse(
            path,
            [
                f"frames of videos have at least {pixels.least} pixels and at most {pixels.most}, "
                f"and {pixels.total} together, which must be a tile, {tile**2}, or more"
            ],
        )
    return pixels


def _settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings of a folder's video processor, and the file that has them."""
    path = folder / VIDEO_PROCESSOR_NAME
    if path.is_file():
        return shared.read_json(path), path
    # transformers 5 keeps them in the other one.
    path = folder / shared.PROCESSOR_NAME
    found = shared.read_json(path).get("video_processor", {}) if path.is_file() else {}
    if not isinstance(found, dict):
        shared.refuse(path, [f"video_processor is {found!r}, must be an object"])
    return found, path


def _of_others(least: int, most: int, tokens: int, tile: int, *, is_shared: bool) -> VideoPixels:
    """Return the bounds of ``Qwen2VLVideoProcessor``.

    Args:
        least, most: pixels of a frame.
        tokens: of all pairs, before 90% are taken of them.
        tile: pixels of a tile.
        is_shared: whether pairs share them out.
    """
    if not is_shared:  # so many that none has less
        pairs = _SAMPLING["max_frames"] // PAIR
        tokens = math.ceil(most * pairs / tile / VIDEO_SHARE)
    return VideoPixels(least=least, most=most, total=int(tokens * tile * VIDEO_SHARE))


def _of_third(least: int, volume: int, tokens: int, tile: int, *, is_shared: bool) -> VideoPixels:
    """Return the bounds of ``Qwen3VLVideoProcessor``.

    Args:
        least, volume: pixels of all frames.
        tokens: tiles of a frame at most.
        tile: pixels of a tile.
        is_shared: whether frames share the pixels out, and have so many tiles at most.
    """
    total = volume // PAIR
    tokens = tokens if is_shared else total // tile
    return VideoPixels(least=least, most=tokens * tile, total=total)


def write(folder: Path, architecture: Architecture, video: VideoPixels, kind: Kind) -> None:
    """Write the settings of the video processor into a folder; without bounds if ``video`` says
    nothing.
    """
    vision = architecture.vision
    name = "Qwen3VLVideoProcessor" if kind.is_third else "Qwen2VLVideoProcessor"
    settings = {
        "video_processor_type": name,
        **patch_settings(architecture, kind),
        **({} if video == UNBOUNDED else bounds_of(video, vision.image_size**2, kind)),
        **_SAMPLING,
    }
    shared.write_json(folder / VIDEO_PROCESSOR_NAME, settings)


def patch_settings(architecture: Architecture, kind: Kind) -> dict[str, Any]:
    """Return how pixels become patches, as image processors and video processors have it."""
    vision = architecture.vision
    return {
        "processor_class": kind.processor,
        **pixel_settings(architecture),
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.grid,
    }


def bounds_of(video: VideoPixels, tile: int, kind: Kind) -> dict[str, Any]:
    """Return the settings that ``read`` makes bounds of; ``tile`` is the pixels of one."""
    edges = (video.least, PAIR * video.total if kind.is_third else video.most)
    tokens = video.most / tile if kind.is_third else video.total / (tile * VIDEO_SHARE)
    found: dict[str, Any] = {
        "size": {new: edge for (new, _), edge in zip(BOUNDS, edges, strict=True)}
    }
    if not kind.is_third:  # releases of transformers 4 read these
        found |= {old: edge for (_, old), edge in zip(BOUNDS, edges, strict=True)}
    return found | {_CAP: True, _TOKENS: max(1, round(tokens))}
