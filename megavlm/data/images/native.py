"""Images of any size as whole tiles, as Qwen2-VL has them (arXiv 2409.12191, section 2.1): an image
gets the nearest size of whole tiles, and is made smaller or larger if that has too many pixels or
too few. The rule is that of transformers' ``Qwen2VLImageProcessor``, to the last pixel.

The frames of a video have one size, smaller if there are many. They are read in pairs; of an odd
number the last is read as an image is. The rule is that of ``Qwen2VLVideoProcessor`` and
``Qwen3VLVideoProcessor`` with ``cap_pixels_per_frame``, and of the package qwen-vl-utils, for an
even number of frames; the second of these first enlarges frames whose side is shorter than a tile.
"""

from __future__ import annotations

import math
from functools import lru_cache

from megavlm.config.tiling import VideoPixels
from megavlm.data.records.reject import RejectError

# Fewest and most pixels of a resized image, of that image processor.
QWEN2_VL_PIXELS = (56 * 56, 1280 * 28 * 28)
# Of the image processor of Qwen3-VL's published models.
QWEN3_VL_PIXELS = (256 * 256, 4096 * 4096)
PAIR = 2
"""Frames of a video that are read together."""
FRAME_TILES = (128, 768)
"""Fewest and most tiles of a frame of a video, in qwen-vl-utils."""
VIDEO_SHARE = 0.9
"""Share of a pack that a video fills at most, likewise."""
# How many times its fewest pixels a frame has, if a video has too many frames; likewise.
_LEAST_CAP = 1.05
# Of which the longer side has so many times the pixels of the shorter.
LONGEST_SHAPE = 200


@lru_cache(maxsize=65536)
def native_grid(
    width: int, height: int, tile_size: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return columns and rows of the tiles of an image.

    Args:
        width, height: of the image, in pixels.
        tile_size: side of a tile in pixels.
        min_pixels: an image with fewer pixels in all its tiles is made larger, to at least so many.
        max_pixels: one with more is made smaller, to at most so many, or to one row of tiles.

    Raises:
        RejectError: the image is too long and narrow.
        ValueError: it has no pixels.
    """
    sides = (width, height)
    if min(sides) < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be tiled")
    if max(sides) / min(sides) > LONGEST_SHAPE:
        raise RejectError(
            "image_shape",
            f"an image of {width} x {height} pixels; one side may be {LONGEST_SHAPE} times as long"
            " as the other",
        )
    columns, rows = (round(side / tile_size) for side in sides)
    pixels = columns * rows * tile_size**2
    if pixels > max_pixels:
        factor = math.sqrt(width * height / max_pixels)
        columns, rows = (max(1, math.floor(side / factor / tile_size)) for side in sides)
    elif pixels < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        columns, rows = (math.ceil(side * factor / tile_size) for side in sides)
    return columns, rows


def usual_video_pixels(tile_size: int, tokens: int) -> VideoPixels:
    """Return the bounds of frames that qwen-vl-utils has.

    Args:
        tile_size: side of a tile in pixels.
        tokens: of a pack, or that a model reads.
    """
    least, most = (count * tile_size**2 for count in FRAME_TILES)
    return VideoPixels(least=least, most=most, total=int(tokens * tile_size**2 * VIDEO_SHARE))


def frame_grid(
    width: int, height: int, frames: int, tile_size: int, pixels: VideoPixels
) -> tuple[int, int]:
    """Return columns and rows of the tiles of each frame of a video; errors are those of
    ``native_grid``.

    Args:
        width, height: of a frame, in pixels.
        frames: how many are read of the video.
        tile_size: side of a tile in pixels.
        pixels: bounds.
    """
    share = pixels.total * PAIR // (-(-frames // PAIR) * PAIR)
    most = max(min(pixels.most, share), int(pixels.least * _LEAST_CAP))
    return native_grid(width, height, tile_size, pixels.least, most)
