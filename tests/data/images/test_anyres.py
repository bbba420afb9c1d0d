"""AnyRes against transformers: pixels, numbers of tokens, and which feature goes where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from megavlm.data.images import anyres, decode
from megavlm.data.images.feature_layout import NEWLINE, feature_layout
from megavlm.data.images.tiling import Tiling
from megavlm.data.sample import Image as StoredImage

SIDE = 28
PATCH = 7
FEATURES = (SIDE // PATCH) ** 2
MORE_GRIDS = ((1, 1), (3, 2), *anyres.LLAVA_GRIDS)
RNG = np.random.default_rng(3)
SIZES = [tuple(map(int, size)) for size in np.exp(RNG.uniform(np.log(3), np.log(200), (60, 2)))]
SIZES += [(56, 28), (28, 28), (112, 112), (57, 113), (199, 3), (2, 180), (1, 400)]


def pinpoints(grids: tuple[anyres.Grid, ...]) -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for columns, rows in grids]


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow resize along rows first, as all versions up to 12 do."""
    resize = Image.Image.resize

    def in_turn(image: Image.Image, size: tuple[int, int], resample=None, **_: object):
        return resize(resize(image, (size[0], image.height), resample), tuple(size), resample)

    monkeypatch.setattr(Image.Image, "resize", in_turn)


def stored(size: tuple[int, int], grids: tuple[anyres.Grid, ...]) -> StoredImage:
    tiling = Tiling(tile_size=SIDE, mode="anyres", grids=grids)
    columns, rows = tiling.grid(*size)
    facts = dict(columns=columns, rows=rows, tiles=tiling.count(columns, rows))
    return StoredImage(encoded=b"", width=size[0], height=size[1], **facts)


# In the large grid a thin image leaves whole tiles empty.
@pytest.mark.parametrize(
    "grids", [anyres.LLAVA_GRIDS, MORE_GRIDS, ((4, 4),)], ids=["usual", "more", "large"]
)
@pytest.mark.parametrize("resizer", ["pillow", "numba"])
def test_pixels_are_those_of_transformers(
    two_passes: None, monkeypatch: pytest.MonkeyPatch, grids: tuple, resizer: str
) -> None:
    resize = decode.load_decoders() if resizer == "numba" else decode._resize_with_pillow
    monkeypatch.setattr(decode, "_resizer", lambda: resize)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=pinpoints(grids),
        do_rescale=False,
        do_normalize=False,
    )
    for size in SIZES:
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
        theirs = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        image = stored(size, grids)
        grid = image.columns, image.rows
        ours = decode.cut_fitted(pixels, *grid, SIDE, anyres.fitted_size(*size, grid, SIDE))
        assert len(ours) == image.tiles
        assert np.array_equal(ours, theirs), size


def test_features_stand_where_transformers_puts_them() -> None:
    class Parts:
        """What the functions of transformers read of their processor and their model."""

        patch_size = PATCH
        num_additional_image_tokens = 1
        image_grid_pinpoints = pinpoints(MORE_GRIDS)
        image_size = SIDE
        image_processor = vision_config = config = property(lambda self: self)
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    layout = feature_layout("anyres", FEATURES)
    for width, height in SIZES:
        image = stored((width, height), MORE_GRIDS)
        found = layout.numbers(image)
        features = torch.arange(image.tiles * FEATURES).reshape(1, image.tiles, FEATURES, 1)
        [expected], _ = LlavaNextModel.pack_image_features(
            Parts(), features, [[height, width]], "default", torch.tensor([NEWLINE])
        )
        assert found.tolist() == expected.flatten().tolist(), (width, height)
        count = LlavaNextProcessor._get_number_of_features(Parts(), height, width, SIDE, SIDE)
        assert layout.count(image) == len(found) == count - 1


@pytest.mark.parametrize("text", ["", "2x", "0x1", "2x1,", "1X2"])
def test_other_texts_are_no_grids(text: str) -> None:
    with pytest.raises(ValueError, match="--grids .*such as 2x1,1x2,2x2,1x3,3x1"):
        anyres.read_grids(text)
    assert anyres.read_grids(anyres.grids_text(MORE_GRIDS)) == MORE_GRIDS


def test_features_that_fill_no_square_are_told() -> None:
    with pytest.raises(ValueError, match="--tokens_per_tile 12.*square number"):
        feature_layout("anyres", 12)


def test_a_tiling_without_grids_is_told() -> None:
    with pytest.raises(ValueError, match="--tiling anyres needs at least one grid"):
        Tiling(tile_size=SIDE, mode="anyres", grids=())
