"""The layout of an image's features: how many placeholder tokens an image has, and which feature
goes to each of them.

It follows from sizes that the index of a pack holds, so that packer, loader and evaluation agree
without looking at pixels. Shapes: F features of a tile, P placeholder tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megavlm.data.images.anyres import unpadded
from megavlm.data.text.image_rows import Shown

NEWLINE = -1
"""Stands for the connector's learned embedding at the end of a row, in the place of a feature."""


class Tiled(Protocol):
    """An image as a layout sees it: its size in pixels, its grid and its tiles."""

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


class _Row(NamedTuple):
    """A row of a pack's table of images."""

    width: int
    height: int
    columns: int
    rows: int
    tiles: int


class FeatureLayout(Protocol):
    """Where the features of images go."""

    def count(self, image: Tiled) -> int:
        """Return P."""

    def numbers(self, image: Tiled) -> np.ndarray:
        """Return the index of each placeholder's feature among the image's, or ``NEWLINE``; int64
        [P].
        """


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
        column = np.array(columns, np.int64)[None]
        side = self.side
        tile = 1 + row // side * image.columns + column // side
        table = np.full((len(rows), len(columns) + 1), NEWLINE, np.int64)
        table[:, :-1] = (tile * side + row % side) * side + column % side
        return np.concatenate([np.arange(side**2), table.ravel()])

    def _shown(self, image: Tiled) -> tuple[range, range]:
        """Return columns and rows of the grid's features that show the image."""
        across = image.columns * self.side
        return unpadded(image.width, image.height, across, image.rows * self.side)


def feature_layout(tiling: str, features_per_tile: int) -> FeatureLayout:
    """Return the layout of images that were tiled in a mode of ``Tiling``.

    Raises:
        ValueError: the mode has none for so many features.
    """
    return (UnpaddedRows if tiling == "anyres" else TileByTile)(features_per_tile)


def sizes_in_text(images: Sequence[Tiled], layout: FeatureLayout) -> tuple[list[int], list[Shown]]:
    """Return the tiles of images, and what they take up in the text, as ``ChatTemplate`` takes
    them.
    """
    shown = [Shown(features=layout.count(image), rows=image.rows) for image in images]
    return [image.tiles for image in images], shown


def numbers_in_pack(
    images: np.ndarray, layout: FeatureLayout, features_per_tile: int
) -> np.ndarray:
    """Return the index of each placeholder's feature among those of all tiles of a pack, or
    ``NEWLINE``; int64 [sum of P].

    Args:
        images: the pack's table of images.
        layout: of each image.
        features_per_tile: F.
    """
    found = []
    tiles = 0
    for row in images[list(_Row._fields)].tolist():
        image = _Row(*row)
        numbers = layout.numbers(image)
        found.append(np.where(numbers == NEWLINE, NEWLINE, numbers + tiles * features_per_tile))
        tiles += image.tiles
    return np.concatenate(found) if found else np.zeros(0, np.int64)
