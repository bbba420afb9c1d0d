"""Tiling against the answers of InternVL's own function, and its rules."""

from __future__ import annotations

import csv
import gzip
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from megavlm.data.images.tiling import (
    Tiling,
    candidate_grids,
    choose_grid,
    image_max_tiles,
    tile_count,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def test_every_golden_grid():
    with gzip.open(GOLDEN / "tile_grids.csv.gz", "rt") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 5255
    wrong = [row for row in rows if _choose(row) != (row["columns"], row["rows"])]
    assert not wrong


def _choose(row: dict[str, int]) -> tuple[int, int]:
    return choose_grid(row["width"], row["height"], row["min_tiles"], row["max_tiles"], 448)


@pytest.mark.parametrize(("most", "grids"), [(1, 1), (2, 3), (4, 8), (6, 14), (12, 35), (24, 84)])
def test_number_of_candidates(most, grids):
    assert (
        len(candidate_grids(1, most))
        == len({grid[:2] for grid in candidate_grids(1, most)})
        == grids
    )


def test_order_of_equally_large_grids_is_of_no_consequence():
    """InternVL leaves that order to the interpreter; with min_tiles 1 no image may depend on it,
    however exact the tie.
    """
    for most in range(1, 41):
        grids = [grid[:2] for grid in candidate_grids(1, most)]
        backwards = sorted(grids, key=lambda grid: (grid[0] * grid[1], -grid[0]))
        shapes = sorted({Fraction(*grid) for grid in grids})
        for low, high in pairwise(shapes):
            between = (low + high) / 2
            for scale in (1, 7, 40, 300, 2000):
                width = between.numerator * scale
                height = between.denominator * scale
                assert choose_grid(width, height, 1, most, 448) == _first_principles(
                    width, height, backwards
                )


def _first_principles(width: int, height: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """Apply the rule with nothing cached: nearest shape; of equally near ones the last whose grid
    is less than twice as large as the image.
    """
    nearest = min(abs(width / height - columns / rows) for columns, rows in grids)
    near = [grid for grid in grids if abs(width / height - grid[0] / grid[1]) == nearest]
    large_enough = [
        grid for grid in near[1:] if width * height > 0.5 * 448 * 448 * grid[0] * grid[1]
    ]
    return large_enough[-1] if large_enough else near[0]


def test_larger_grid_of_the_same_shape_for_more_pixels():
    assert choose_grid(448, 448, 1, 12, 448) == (1, 1)
    assert choose_grid(700, 700, 1, 12, 448) == (2, 2)
    assert choose_grid(2000, 2000, 1, 12, 448) == (3, 3)
    assert choose_grid(2000, 1000, 1, 12, 448) == (4, 2)


def test_min_tiles():
    assert choose_grid(448, 448, 4, 12, 448) == (2, 2)
    assert choose_grid(448, 448, 5, 4, 448) == (1, 1)


def test_thumbnail_counts_where_there_are_several_tiles():
    assert tile_count(1, 1, True) == 1
    assert tile_count(3, 2, True) == 7
    assert tile_count(3, 2, False) == 6


def test_images_of_one_record_share_the_tiles():
    assert [image_max_tiles(12, images) for images in (1, 2, 5, 12, 40)] == [12, 6, 2, 1, 1]
    tiling = Tiling(tile_size=448, max_tiles=12)
    assert tiling.grid(2000, 1000) == (4, 2)
    assert tiling.grid(2000, 1000, images=6) == (2, 1)
    assert tiling.grid(2000, 1000, max_tiles=2) == (2, 1)
    assert tiling.count(4, 2) == 9


@pytest.mark.parametrize(
    "bad", [{"min_tiles": 0}, {"min_tiles": 5, "max_tiles": 4}, {"tile_size": 0}]
)
def test_settings_that_cannot_be(bad):
    with pytest.raises(ValueError, match="--"):
        Tiling(**{"tile_size": 448, **bad})


def test_an_image_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="0 x 5"):
        choose_grid(0, 5, 1, 12, 448)
