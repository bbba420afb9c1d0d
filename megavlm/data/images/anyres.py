"""AnyRes, the tiles of LLaVA-NeXT (Liu et al., 2024; a blog post, no paper): an image is resized to
a grid of tiles of its own shape, filled up at two edges, and is also one tile as a whole. In
LLaVA-OneVision (Li et al., 2024, arXiv 2408.03326) grids are larger, the features of a large grid
are made fewer, and several images of one sample have no grids.

The rules are those of transformers' ``LlavaNextImageProcessor`` and
``LlavaOnevisionImageProcessor``, to the last pixel; what they call ``image_grid_pinpoints`` are the
grids here, in tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from megavlm.config.tiling import BOUNDED, MOST_TILES

Grid = tuple[int, int]
"""Columns and rows of tiles."""

# LLaVA-NeXT's, in its order: the first of two that fit an image equally well is taken.
LLAVA_GRIDS: tuple[Grid, ...] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
ONEVISION_GRIDS: tuple[Grid, ...] = tuple(
    (columns, rows) for rows in range(1, 7) for columns in range(1, 7)
)
USUAL_GRIDS: Mapping[str, tuple[Grid, ...]] = {"anyres": LLAVA_GRIDS, BOUNDED: ONEVISION_GRIDS}
"""By the modes of ``Tiling`` in which images have grids: those of the models that had them first.
"""

# Of a grid with more features than so many tiles have, there are made fewer.
_BOUND = 9
# Not of one that has a little more: the root of how many times as many it may have.
_SLACK = 1.1


def grids_text(grids: Sequence[Grid]) -> str:
    """Write grids as ``--grids`` has them, such as ``2x1,1x2``."""
    return ",".join(f"{columns}x{rows}" for columns, rows in grids)


def read_grids(text: str) -> tuple[Grid, ...]:
    """Read what ``grids_text`` writes.

    Raises:
        ValueError: it is something else.
    """
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise ValueError(
            f"--grids {text}: must be columns and rows of tiles, such as {grids_text(LLAVA_GRIDS)}"
        )
    grids = tuple((int(grid[1]), int(grid[2])) for grid in found)
    if any(columns * rows > MOST_TILES for columns, rows in grids):
        raise ValueError(f"--grids {text}: a grid has at most {MOST_TILES} tiles")
    return grids


@lru_cache(maxsize=65536)
def best_grid(width: int, height: int, grids: tuple[Grid, ...], tile_size: int) -> Grid:
    """Choose the grid for an image: the one in which most of its pixels are left, and of several
    the smallest.

    Args:
        width, height: of the image, in pixels.
        grids: to choose from, the first of equals; at least one.
        tile_size: side of a tile in pixels.

    Raises:
        ValueError: the image has no pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be tiled")
    best = grids[0]
    most_used = 0
    least_wasted = math.inf
    for columns, rows in grids:
        across = columns * tile_size
        down = rows * tile_size
        scale = min(across / width, down / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - used
        if used > most_used or (used == most_used and wasted < least_wasted):
            best = columns, rows
            most_used = used
            least_wasted = wasted
    return best


def fitted_size(width: int, height: int, grid: Grid, tile_size: int) -> tuple[int, int]:
    """Return width and height in pixels that an image is resized to, inside its grid."""
    across, down = (count * tile_size for count in grid)
    scale_across = across / width
    scale_down = down / height
    if scale_across < scale_down:
        return across, min(math.ceil(height * scale_across), down)
    return min(math.ceil(width * scale_down), across), down


def unpadded(width: int, height: int, across: int, down: int) -> tuple[range, range]:
    """Return which columns and rows of a table of features show the image, and not what it was
    filled up with.

    Args:
        width, height: of the image, in pixels.
        across, down: columns and rows of the table.
    """
    if width / height > across / down:
        kept = int(round(height * (across / width), 7))
        cut = (down - kept) // 2
        return range(across), range(cut, down - cut)
    kept = int(round(width * (down / height), 7))
    cut = (across - kept) // 2
    return range(cut, across - cut), range(down)


def bounded(across: int, down: int, side: int) -> tuple[int, int]:
    """Return how many columns and rows a table of features is made smaller to, or its own if it is
    not.

    Args:
        across, down: columns and rows of the table, without those of the padding.
        side: columns of the features of one tile.
    """
    ratio = math.sqrt(across * down / (_BOUND * side**2))
    return (int(across // ratio), int(down // ratio)) if ratio > _SLACK else (across, down)


def mixture(count: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Return of which two of ``count`` features in a row each of fewer is made by linear
    interpolation, int64 [wanted, 2], and their weights, float32 [wanted, 2].

    They are those of ``torch.nn.functional.interpolate`` with ``align_corners=False``, in its
    arithmetic.
    """
    scale = np.float32(count) / np.float32(wanted)
    middle = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    middle = np.maximum(middle, np.float32(0))
    first = np.minimum(middle.astype(np.int64), count - 1)
    share = middle - first.astype(np.float32)
    second = np.minimum(first + 1, count - 1)
    return np.stack([first, second], 1), np.stack([1 - share, share], 1)
