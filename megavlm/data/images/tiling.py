"""Dynamic tiling: which grid of square tiles an image is resized to.

The grid whose shape is nearest to the image's is taken, among all grids of an allowed number of
tiles; of grids of one shape, the larger one is taken if the image has more than half as many pixels
as the grid. The rule is InternVL 1.5's (Chen et al., 2024, arXiv:2404.16821).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from megavlm.config.tiling import (
    ANY_SIZE,
    BOUNDED,
    MOST_TILES,
    UNBOUNDED,
    WITH_GRIDS,
    Mode,
    VideoPixels,
)
from megavlm.data.images.anyres import LLAVA_GRIDS, Grid, best_grid
from megavlm.data.images.native import (
    QWEN2_VL_PIXELS,
    frame_grid,
    native_grid,
    usual_video_pixels,
)
from megavlm.data.images.patches import fitted_size, patch_grid
from megavlm.data.text.chat_format import ChatFormat

# Along a side of a tile, of which even one then fills a gigabyte.
MOST_PIXELS = 2**14
# Fuyu's, in pixels.
FUYU_LIMIT = (1920, 1080)
# Tokens that qwen-vl-utils makes videos for, if nothing is said.
_USUAL_TOKENS = 128_000
# Of a resized image, as many as are decoded of a file.
MOST_IMAGE_PIXELS = 2**29


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images become tiles.

    Args:
        tile_size: side of a tile in pixels.
        min_tiles: fewest tiles of an image, thumbnail not counted.
        max_tiles: most tiles of an image, thumbnail not counted; the images of one record share it.
        thumbnail: whether an image of several tiles gets a thumbnail, the whole image as one more
            tile.
        mode: ``dynamic``; or each image is one tile: filled up to a square (``pad``) or the square
            in its middle (``crop``), as LLaVA has them, or all of it with another shape
            (``stretch``), as PaliGemma. ``patches``: a tile is a patch, and an image has as many as
            cover it, as in Fuyu. ``native``: an image has as many tiles as are nearest to its size,
            as in Qwen2-VL. ``anyres``: the whole image, then a grid of tiles that it is
            fitted into, as in LLaVA-NeXT. ``anyres_max_9``: the same for a record of one image;
            those of several are one tile each, filled up to a square, and a frame of a video is one
            tile of another shape, as in LLaVA-OneVision.
        pixel_mean: mean of red, green and blue, from 0 to 1: what squares are filled with.
        resample: how images are resized to tiles: ``bicubic`` or ``bilinear``; those of
            ``patches`` are always bilinear.
        limit: for ``patches``: width and height in pixels that larger images are made smaller to.
        min_pixels: for ``native``: fewest pixels of all tiles of an image.
        max_pixels: for ``native``: most pixels of all tiles of an image.
        video: for ``native``: bounds of the frames of a video; nothing: those of qwen-vl-utils.
        grids: for ``anyres`` and ``anyres_max_9``: the grids that images may have.
        exif_rotation: whether images are turned as their EXIF says.
    """

    tile_size: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    mode: Mode = "dynamic"
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    resample: str = "bicubic"
    limit: tuple[int, int] = FUYU_LIMIT
    min_pixels: int = QWEN2_VL_PIXELS[0]
    max_pixels: int = QWEN2_VL_PIXELS[1]
    video: VideoPixels = UNBOUNDED
    grids: tuple[Grid, ...] = LLAVA_GRIDS
    exif_rotation: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.tile_size <= MOST_PIXELS:
            raise ValueError(f"--image_size {self.tile_size}: must be 1 to {MOST_PIXELS} pixels")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"--min_tiles {self.min_tiles} and --max_tiles {self.max_tiles}: must be 1 <= min"
                " <= max"
            )
        if self.max_tiles > MOST_TILES:
            raise ValueError(f"--max_tiles {self.max_tiles}: an image has at most {MOST_TILES}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"--tiling {self.mode}: must be one of {', '.join(get_args(Mode))}")
        if self.has_grids and not self.grids:
            raise ValueError(f"--grids: --tiling {self.mode} needs at least one grid")
        if self.mode == "patches" and any(side < 1 or side % self.tile_size for side in self.limit):
            width, height = self.limit
            raise ValueError(
                f"--image_limit {width}x{height}: both must be multiples of the patch, --image_size"
                f" {self.tile_size}"
            )
        if self.mode == "native":
            self._check_pixels()

    def _check_pixels(self) -> None:
        """Raise ValueError for bounds of the pixels of an image that no size has."""
        tile = self.tile_size**2
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"--min_pixels {self.min_pixels} and --max_pixels {self.max_pixels}: must be 1 <="
                " min <= max"
            )
        if not tile <= self.max_pixels <= MOST_IMAGE_PIXELS:
            raise ValueError(
                f"--max_pixels {self.max_pixels}: must be from {tile}, the pixels of one tile, to"
                f" {MOST_IMAGE_PIXELS}"
            )
        video = self.video_pixels
        flags = (
            f"--video_min_pixels {video.least}, --video_max_pixels {video.most} and"
            f" --video_total_pixels {video.total}"
        )
        if not 1 <= video.least <= video.most <= MOST_IMAGE_PIXELS or video.most < tile:
            raise ValueError(
                f"{flags}: must be 1 <= min <= max, and max from {tile}, the pixels of one tile, to"
                f" {MOST_IMAGE_PIXELS}"
            )
        if video.total < tile:
            raise ValueError(f"{flags}: total must be {tile} or more, the pixels of one tile")

    @property
    def video_pixels(self) -> VideoPixels:
        """Bounds of the frames of a video for ``native``."""
        if self.video == UNBOUNDED:
            return usual_video_pixels(self.tile_size, _USUAL_TOKENS)
        return self.video

    @property
    def has_grids(self) -> bool:
        """Whether images are fitted into grids, and are one more tile as a whole."""
        return self.mode in WITH_GRIDS

    @property
    def size_flag(self) -> str:
        """The option that makes images smaller."""
        if self.has_grids:
            return "--grids"
        flags = {"patches": "--image_limit", "native": "--max_pixels"}
        return flags.get(self.mode, "--max_tiles")

    @property
    def least_tiles(self) -> int:
        """The tiles of an image that is made as small as can be."""
        if self.mode == "native":
            return -(-self.min_pixels // self.tile_size**2)
        return 2 if self.has_grids else 1

    @property
    def takes_frames(self) -> bool:
        """Whether images may be frames of videos."""
        return self.mode not in ("patches", "anyres")

    @property
    def pairs_frames(self) -> bool:
        """Whether frames of a video have as many tiles as their size asks for, and are read in
        pairs; otherwise each is one tile.
        """
        return self.mode == "native"

    @property
    def joins_frames(self) -> bool:
        """Whether the frames of a video are one image in the text, unless a template has each pair
        behind its time.
        """
        return self.mode == BOUNDED or self.pairs_frames

    def shows_times(self, form: ChatFormat) -> bool:
        """Whether each pair of frames of a video stands behind its time in conversations of a
        format.
        """
        return self.pairs_frames and form.times_frames

    @property
    def pad_colour(self) -> tuple[int, int, int] | None:
        """What images are filled up with to squares; None: they are not."""
        return pad_colour(self.mode, self.pixel_mean)

    def grid(
        self, width: int, height: int, images: int = 1, max_tiles: int | None = None
    ) -> tuple[int, int]:
        """Columns and rows for an image of ``width`` x ``height`` pixels, one of ``images`` in its
        record.

        ``max_tiles`` stands in for the setting of the same name, for a source that has its own.

        Raises:
            RejectError: the image has a shape that the mode does not take.
            ValueError: it has no pixels.
        """
        if self.mode == "patches":
            return patch_grid(fitted_size(width, height, self.limit), self.tile_size)
        if self.mode == "native":
            return native_grid(width, height, self.tile_size, self.min_pixels, self.max_pixels)
        if self.mode == BOUNDED and images > 1:
            return 1, 1
        if self.has_grids:
            return best_grid(width, height, self.grids, self.tile_size)
        if self.mode != "dynamic":
            return 1, 1
        most = image_max_tiles(self.max_tiles if max_tiles is None else max_tiles, images)
        return choose_grid(width, height, self.min_tiles, most, self.tile_size)

    def frame_grid(self, width: int, height: int, frames: int) -> tuple[int, int]:
        """Columns and rows of each of ``frames`` frames of a video, of ``width`` x ``height``
        pixels; errors as in ``grid``.
        """
        if not self.pairs_frames:
            return 1, 1
        return frame_grid(width, height, frames, self.tile_size, self.video_pixels)

    def count(self, columns: int, rows: int, images: int = 1) -> int:
        """Tiles of an image with this grid, one of ``images`` in its record, the whole image as one
        of its own counted.
        """
        if self.mode == BOUNDED and images > 1:
            return 1
        if self.has_grids:
            return columns * rows + 1
        return tile_count(columns, rows, self.thumbnail and self.mode not in ANY_SIZE)


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int, float], ...]:
    """(columns, rows, columns / rows) of the grids of ``min_tiles`` to ``max_tiles`` tiles, by
    tiles, then by columns.

    InternVL sorts a Python set by tiles alone, so the order of grids with equally many tiles is
    left to the interpreter. It is of no consequence with ``min_tiles`` 1 (a test shows it). Above
    1, where few numbers of tiles are allowed, an image exactly between two grids of equally many
    tiles may get the other one than in InternVL.
    """
    grids = {
        (columns, tiles // columns)
        for tiles in range(min_tiles, max_tiles + 1)
        for columns in range(1, tiles + 1)
        if tiles % columns == 0
    }
    return tuple(
        (columns, rows, columns / rows)
        for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
    )


@lru_cache(maxsize=65536)
def choose_grid(
    width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int
) -> tuple[int, int]:
    """Choose the grid for an image, as (columns, rows); (1, 1) if ``min_tiles`` is above
    ``max_tiles``.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        min_tiles: fewest tiles, thumbnail not counted.
        max_tiles: most tiles, thumbnail not counted.
        tile_size: side of a tile in pixels.

    Raises:
        ValueError: the image has no pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be tiled")
    shape = width / height
    best = (1, 1)
    best_difference = float("inf")
    for columns, rows, grid_shape in candidate_grids(min_tiles, max_tiles):
        difference = abs(shape - grid_shape)
        if difference < best_difference:
            best = (columns, rows)
            best_difference = difference
        elif difference == best_difference and 2 * width * height > tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


def pad_colour(mode: str, pixel_mean: tuple[float, float, float]) -> tuple[int, int, int] | None:
    """Return the mean colour, from 0 to 255, if images are padded to squares; else None."""
    return colour_of(pixel_mean) if mode == "pad" else None


def colour_of(pixel_mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the mean colour, from 0 to 255, which images are filled up with to squares."""
    return tuple(int(255 * value) for value in pixel_mean)


def tile_count(columns: int, rows: int, thumbnail: bool) -> int:
    """Tiles of an image: those of its grid, and a thumbnail where the grid has more than one."""
    return columns * rows + (thumbnail and columns * rows > 1)


def image_max_tiles(max_tiles: int, images: int) -> int:
    """Most tiles of each of the ``images`` of one record, which share ``max_tiles``; at least one
    each.
    """
    return max(1, max_tiles // max(1, images))
