"""The layout of an image's features: how many placeholder tokens an image has, and which feature
goes to each of them.

It follows from sizes that the index of a pack holds, so that packer, loader and evaluation agree
without looking at pixels. Shapes: F features of a tile, P placeholder tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megavlm.config.tiling import BOUNDED
from megavlm.data.images.anyres import bounded, mixture, unpadded
from megavlm.data.text.image_rows import Shown

NEWLINE = -1
"""Stands for the connector's learned embedding at the end of a row, in the place of a feature."""
MIXED = -2
"""Stands for a weighted sum of four features, in the place of a feature."""


class Tiled(Protocol):
    """An image as a layout sees it: its size in pixels, its grid, its tiles and what it is of a
    video, as in ``Image``.
    """

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def tiles(self) -> int: ...

    @property
    def frames(self) -> int: ...

    @property
    def interval(self) -> float: ...


class _Row(NamedTuple):
    """A row of a pack's table of images."""

    width: int
    height: int
    columns: int
    rows: int
    tiles: int
    frames: int
    interval: float


class FeatureLayout(Protocol):
    """Where the features of images go."""

    def count(self, image: Tiled) -> int:
        """Return P."""

    def numbers(self, image: Tiled) -> np.ndarray:
        """Return the index of each placeholder's feature among the image's, or ``NEWLINE`` or
        ``MIXED``; int64 [P].
        """

    def mixed(self, image: Tiled) -> Mixed | None:
        """Return what goes to the placeholders of ``MIXED``; none if there are none."""


class Mixed(NamedTuple):
    """Weighted sums of features, for M placeholders.

    Args:
        numbers: int64 [M, 4], indices of the features.
        weights: float32 [M, 4].
    """

    numbers: np.ndarray
    weights: np.ndarray


class TileByTile:
    """All features of all tiles, in their order.

    Args:
        features_per_tile: F.
    """

    def __init__(self, features_per_tile: int) -> None:
        self.features_per_tile = features_per_tile

    def count(self, image: Tiled) -> int:
        """See ``FeatureLayout``."""
        return image.tiles * self.features_per_tile

    def numbers(self, image: Tiled) -> np.ndarray:
        """See ``FeatureLayout``."""
        return np.arange(self.count(image))

    def mixed(self, image: Tiled) -> Mixed | None:
        """See ``FeatureLayout``."""
        return None


class UnpaddedRows:
    """The features of the first tile, the whole image; then those of the grid row by row across its
    tiles, without the rows and columns of padding, with a newline behind each row
    (``spatial_unpad`` of LLaVA-NeXT).

    Args:
        features_per_tile: F.

    Raises:
        ValueError: the features of a tile are no square.
    """

    def __init__(self, features_per_tile: int) -> None:
        self.side = math.isqrt(features_per_tile)
        if self.side**2 != features_per_tile:
            raise ValueError(
                f"--tokens_per_tile {features_per_tile}: --tiling anyres arranges the features of a"
                " tile in a square, so use a square number"
            )

    def count(self, image: Tiled) -> int:
        """See ``FeatureLayout``."""
        columns, rows = self._shown(image)
        return self.side**2 + len(rows) * (len(columns) + 1)

    def numbers(self, image: Tiled) -> np.ndarray:
        """See ``FeatureLayout``."""
        columns, rows = self._shown(image)
        row = np.array(rows, np.int64)[:, None]
        return self._in_rows(self._in_grid(image, row, np.array(columns, np.int64)[None]))

    def mixed(self, image: Tiled) -> Mixed | None:
        """See ``FeatureLayout``."""
        return None

    def _in_grid(self, image: Tiled, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return the indices of the features at rows and columns of the grid's table."""
        side = self.side
        tile = (image.tiles > 1) + row // side * image.columns + column // side
        return (tile * side + row % side) * side + column % side

    def _in_rows(self, table: np.ndarray) -> np.ndarray:
        """Put the whole image's features before a table, and a newline behind each of its rows."""
        rows = np.pad(table, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.side**2), rows.ravel()])

    def _shown(self, image: Tiled) -> tuple[range, range]:
        """Return columns and rows of the grid's features that show the image."""
        across = image.columns * self.side
        return unpadded(image.width, image.height, across, image.rows * self.side)


class BoundedRows(UnpaddedRows):
    """``UnpaddedRows`` with fewer features of a large grid, by bilinear interpolation. Of an image
    without a grid the features of its one tile and a newline; of a video a quarter of the features
    of each frame, made in the same way, and one newline behind the last (LLaVA-OneVision).
    """

    def count(self, image: Tiled) -> int:
        """See ``FeatureLayout``."""
        columns, rows = self._kept(image)
        if image.tiles == 1:
            return columns * rows + _is_end(image)
        return self.side**2 + rows * (columns + 1)

    def numbers(self, image: Tiled) -> np.ndarray:
        """See ``FeatureLayout``."""
        columns, rows = self._kept(image)
        is_mixed = (columns, rows) != tuple(map(len, self._shown(image)))
        if image.tiles == 1:
            count = columns * rows
            features = np.full(count, MIXED, np.int64) if is_mixed else np.arange(count)
            return np.append(features, NEWLINE) if _is_end(image) else features
        if is_mixed:
            return self._in_rows(np.full((rows, columns), MIXED, np.int64))
        return super().numbers(image)

    def mixed(self, image: Tiled) -> Mixed | None:
        """See ``FeatureLayout``."""
        across, down = self._shown(image)
        columns, rows = self._kept(image)
        if (columns, rows) == (len(across), len(down)):
            return None
        row, of_row = mixture(len(down), rows)
        column, of_column = mixture(len(across), columns)
        # [rows, columns, 2, 2]
        row = down.start + row[:, None, :, None]
        column = across.start + column[None, :, None, :]
        weights = of_row[:, None, :, None] * of_column[None, :, None, :]
        numbers = self._in_grid(image, row, column)
        return Mixed(numbers.reshape(-1, 4), weights.reshape(-1, 4))

    def _kept(self, image: Tiled) -> tuple[int, int]:
        """Return columns and rows of what the features that show an image become."""
        if is_joined(image):
            half = math.ceil(self.side / 2)
            return half, half
        return bounded(*map(len, self._shown(image)), self.side)

    def _shown(self, image: Tiled) -> tuple[range, range]:
        """See ``UnpaddedRows``; a tile without a grid is shown as a whole."""
        if image.tiles == 1:
            return range(self.side), range(self.side)
        return super()._shown(image)


def is_joined(image: Tiled) -> bool:
    """Whether an image is a frame of a video whose frames are one image in the text."""
    return image.frames > 0


def _is_end(image: Tiled) -> bool:
    """Whether an image in the text ends with this image, as with all but frames that others of
    their video follow.
    """
    return image.frames <= 1


_LAYOUTS: Mapping[str, Callable[[int], FeatureLayout]] = {
    "anyres": UnpaddedRows,
    BOUNDED: BoundedRows,
}


def feature_layout(tiling: str, features_per_tile: int) -> FeatureLayout:
    """Return the layout of images that were tiled in a mode of ``Tiling``.

    Raises:
        ValueError: the mode has none for so many features.
    """
    return _LAYOUTS.get(tiling, TileByTile)(features_per_tile)


def sizes_in_text(images: Sequence[Tiled], layout: FeatureLayout) -> tuple[list[int], list[Shown]]:
    """Return the tiles of images, and what they take up in the text, as ``ChatTemplate`` takes
    them: frames that are one image in the text together.
    """
    tiles: list[int] = []
    shown: list[Shown] = []
    for group in images_in_text(images):
        rows = 1 if is_joined(group[0]) else group[0].rows
        tiles.append(sum(image.tiles for image in group))
        shown.append(Shown(sum(map(layout.count, group)), rows, len(group)))
    return tiles, shown


def images_in_text(images: Sequence[Tiled]) -> Iterator[list[Tiled]]:
    """Yield what is one image in the text: an image, or the frames of a video if they are."""
    group: list[Tiled] = []
    for image in images:
        group.append(image)
        if _is_end(image):
            yield group
            group = []


def numbers_in_pack(
    images: np.ndarray,
    layout: FeatureLayout,
    features_per_tile: int,
    *,
    preferences: bool = False,
) -> np.ndarray:
    """Return the index of each placeholder's feature among those of all tiles of a pack, or
    ``NEWLINE`` or ``MIXED``; int64 [sum of P].

    Args:
        images: the pack's table of images.
        layout: of each image.
        features_per_tile: F.
        preferences: whether the rejected sample behind the one that an image belongs to has
            placeholders of it too.
    """
    found = []
    for image, first in _of_pack(images, features_per_tile, preferences):
        numbers = layout.numbers(image)
        found.append(np.where(numbers < 0, numbers, numbers + first))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def mixed_in_pack(
    images: np.ndarray,
    layout: FeatureLayout,
    features_per_tile: int,
    *,
    preferences: bool = False,
) -> Mixed | None:
    """Return what goes to a pack's placeholders of ``MIXED``, with indices among the features of
    all its tiles; none if there are none. Arguments are those of ``numbers_in_pack``.
    """
    found = []
    for image, first in _of_pack(images, features_per_tile, preferences):
        mixed = layout.mixed(image)
        if mixed is not None:
            found.append(Mixed(mixed.numbers + first, mixed.weights))
    return Mixed(*map(np.concatenate, zip(*found, strict=True))) if found else None


def in_text_order(images: np.ndarray, *, preferences: bool = False) -> list[Tiled]:
    """Return a pack's images in the order of their placeholders, each as often as it has them.
    Arguments are those of ``numbers_in_pack``.
    """
    return [image for image, _ in _of_pack(images, 1, preferences)]


def as_tiled(images: np.ndarray) -> list[Tiled]:
    """Return the rows of a pack's table of images as layouts see them."""
    return [_Row(*row) for row in images[list(_Row._fields)].tolist()]


def _of_pack(
    images: np.ndarray, features_per_tile: int, preferences: bool
) -> Iterator[tuple[Tiled, int]]:
    """Yield the images in the order of their placeholders in a pack, each with the index of its
    first feature: with ``preferences`` those of a pair twice, one time after the other.
    """
    tiles = np.cumsum(images["tiles"], dtype=np.int64) - images["tiles"]
    found = list(zip(as_tiled(images), (tiles * features_per_tile).tolist(), strict=True))
    ends = np.flatnonzero(np.diff(images["sample"], append=-1)) + 1
    start = 0
    for end in ends.tolist():
        for _ in range(2 if preferences else 1):
            yield from found[start:end]
        start = end
