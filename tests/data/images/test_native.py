"""Sizes of images as whole tiles against ``smart_resize`` of ``transformers``."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from megavlm.data.images.native import native_grid
from megavlm.data.images.tiling import Tiling
from megavlm.data.records.reject import RejectError


@pytest.mark.parametrize(
    ("least", "most"), [(56 * 56, 1280 * 28 * 28), (784, 784), (3136, 16384 * 784), (10**5, 10**5)]
)
def test_grids_are_those_of_transformers(least: int, most: int) -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(20000), (4000, 2))).astype(int).tolist()
    sides = (1, 13, 14, 15, 27, 28, 41, 42, 43, 69, 70, 71, 98, 2800, 20000)
    sizes += [(width, height) for width in sides for height in sides]
    grids = set()
    refused = 0
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            refused += 1
            with pytest.raises(RejectError, match=f"image_shape: an image of {width} x {height}"):
                native_grid(width, height, 28, least, most)
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(height, width, 28, least, most)
            continue
        rows, columns = smart_resize(height, width, 28, least, most)
        grid = native_grid(width, height, 28, least, most)
        assert grid == (columns // 28, rows // 28), (width, height)
        assert min(grid) >= 1
        grids.add(grid)
    assert refused > 500 and (len(grids) > 100 or least == most)


def test_images_of_no_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 3 pixels cannot be tiled"):
        native_grid(0, 3, 28, 784, 3136)


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ({"min_pixels": 0}, "--min_pixels 0 and --max_pixels 1003520: must be 1 <= min <= max"),
        ({"min_pixels": 4000, "max_pixels": 3999}, "--min_pixels 4000 and --max_pixels 3999"),
        (
            {"min_pixels": 1, "max_pixels": 783},
            "--max_pixels 783: must be from 784, the pixels of one tile, to 536870912",
        ),
        ({"max_pixels": 2**30}, "--max_pixels 1073741824: must be from 784"),
    ],
)
def test_bounds_that_no_image_has_are_refused(bounds: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Tiling(tile_size=28, mode="native", **bounds)
    Tiling(tile_size=28, mode="dynamic", **bounds)


def test_an_image_has_no_thumbnail_and_a_source_no_tiles_of_its_own() -> None:
    tiling = Tiling(tile_size=28, mode="native")
    assert tiling.grid(280, 140, images=3, max_tiles=1) == (10, 5)
    assert tiling.count(10, 5, images=3) == 50
    assert tiling.size_flag == "--max_pixels" and tiling.least_tiles == 4
    assert not tiling.has_grids and tiling.pad_colour is None
