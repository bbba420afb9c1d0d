"""How images become tiles, by name; ``megavlm/data/images/tiling.py`` says what each does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["dynamic", "pad", "crop", "stretch", "patches", "native", "anyres", "anyres_max_9"]
Tiling = Literal["any", Mode]
"""What a run asks of its packs."""
# LLaVA-OneVision's rule; its authors and transformers name it so.
BOUNDED: Mode = "anyres_max_9"
WITH_GRIDS: tuple[Mode, ...] = ("anyres", BOUNDED)
"""Modes in which an image is also a grid of tiles, and an embedding ends each row of features."""
ANY_SIZE: tuple[Mode, ...] = ("patches", "native")
"""Modes in which an image has as many tiles as its own size asks for."""
MOST_TILES = 1024
"""Of an image in other modes: far more than a model can read, and few enough to be held in
memory."""


@dataclass(frozen=True, kw_only=True)
class VideoPixels:
    """How large the frames of a video are made, in pixels, if images keep their own size.

    Args:
        least: fewest of a frame.
        most: most of a frame.
        total: most of all frames of a video, of which those that are read together count as one; a
            frame may have 1.05 times ``least`` all the same. All 0: nothing is said.
    """

    least: int = 0
    most: int = 0
    total: int = 0


UNBOUNDED = VideoPixels()
"""Nothing is said."""


@dataclass(frozen=True, kw_only=True)
class StatedTiles:
    """What the folder of a model states of the tiles of its images; packs for it have the same
    unless something else is asked for.

    Args:
        grids: columns and rows of the grids that images may have; none: nothing.
        pixels: fewest and most pixels of an image of any size; none: nothing.
        file: which states them.
        video: bounds of the frames of a video.
    """

    grids: tuple[tuple[int, int], ...] = ()
    pixels: tuple[int, int] | None = None
    file: str = ""
    video: VideoPixels = UNBOUNDED


NOTHING_STATED = StatedTiles()
