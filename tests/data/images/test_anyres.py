"""AnyRes against transformers: pixels, numbers of tokens, and which feature goes where."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from megavlm.data.images import anyres, decode
from megavlm.data.images.feature_layout import MIXED, NEWLINE, feature_layout, sizes_in_text
from megavlm.data.images.tiling import Tiling
from megavlm.data.sample import Image as StoredImage
from megavlm.data.text.image_rows import Shown

SIDE = 28
PATCH = 7
FEATURES = (SIDE // PATCH) ** 2
MORE_GRIDS = ((1, 1), (3, 2), *anyres.LLAVA_GRIDS)
RNG = np.random.default_rng(3)
SIZES = [tuple(map(int, size)) for size in np.exp(RNG.uniform(np.log(3), np.log(200), (60, 2)))]
SIZES += [(56, 28), (28, 28), (112, 112), (57, 113), (199, 3), (2, 180), (1, 400)]


def pinpoints(grids: tuple[anyres.Grid, ...]) -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for columns, rows in grids]


def resize_along_rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow resize along rows first, as all versions up to 12 do."""
    resize = Image.Image.resize

    def in_turn(image: Image.Image, size: tuple[int, int], resample=None, **_: object):
        return resize(resize(image, (size[0], image.height), resample), tuple(size), resample)

    monkeypatch.setattr(Image.Image, "resize", in_turn)


def stored(
    size: tuple[int, int], grids: tuple[anyres.Grid, ...], mode: str = "anyres", images: int = 1
) -> StoredImage:
    tiling = Tiling(tile_size=SIDE, mode=mode, grids=grids)
    columns, rows = tiling.grid(*size, images)
    facts = dict(columns=columns, rows=rows, tiles=tiling.count(columns, rows, images))
    return StoredImage(encoded=b"", width=size[0], height=size[1], **facts)


# In the large grid a thin image leaves whole tiles empty.
@pytest.mark.parametrize(
    "grids",
    [anyres.LLAVA_GRIDS, MORE_GRIDS, ((4, 4),), anyres.ONEVISION_GRIDS],
    ids=["usual", "more", "large", "onevision"],
)
@pytest.mark.parametrize("resizer", ["pillow", "numba"])
def test_pixels_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, grids: tuple, resizer: str
) -> None:
    resize_along_rows_first(monkeypatch)
    resize = decode.load_decoders() if resizer == "numba" else decode._resize_with_pillow
    monkeypatch.setattr(decode, "_resizer", lambda: resize)
    shape = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    kind = LlavaNextImageProcessorPil
    if grids == anyres.ONEVISION_GRIDS:
        shape = dict(size={"height": SIDE, "width": SIDE})
        kind = LlavaOnevisionImageProcessorPil
    plain = dict(do_rescale=False, do_normalize=False)
    processor = kind(image_grid_pinpoints=pinpoints(grids), **shape, **plain)
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


def test_features_of_large_grids_are_mixed_as_transformers_does() -> None:
    class Parts:
        """What the functions of transformers read of their processor and their model."""

        patch_size = PATCH
        num_image_tokens = FEATURES
        vision_aspect_ratio = "anyres_max_9"
        image_grid_pinpoints = pinpoints(anyres.ONEVISION_GRIDS)
        image_size = SIDE
        image_processor = vision_config = config = property(lambda self: self)
        _get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features

    layout = feature_layout("anyres_max_9", FEATURES)
    newline = torch.full((3,), 7.0)
    smaller = 0
    for width, height in SIZES:
        image = stored((width, height), anyres.ONEVISION_GRIDS, "anyres_max_9")
        features = torch.from_numpy(RNG.normal(size=(image.tiles, FEATURES, 3)).astype(np.float32))
        [expected], _ = LlavaOnevisionModel.pack_image_features(
            Parts(), [features], [[height, width]], newline
        )
        numbers = torch.from_numpy(layout.numbers(image))
        found = torch.where((numbers == NEWLINE)[:, None], newline, features.flatten(0, 1)[numbers])
        mixed = layout.mixed(image)
        assert (mixed is None) == (MIXED not in numbers)
        if mixed is not None:
            smaller += 1
            parts = (
                features.flatten(0, 1)[mixed.numbers] * torch.from_numpy(mixed.weights)[..., None]
            )
            found[numbers == MIXED] = parts.sum(1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        count = LlavaOnevisionProcessor._get_number_of_features(Parts(), height, width, SIDE, SIDE)
        assert layout.count(image) == len(found) == count
    assert 3 < smaller < len(SIZES) - 3
    one = stored((50, 20), anyres.ONEVISION_GRIDS, "anyres_max_9", images=2)
    assert (one.columns, one.rows, one.tiles, layout.mixed(one)) == (1, 1, 1, None)
    assert layout.numbers(one).tolist() == [*range(FEATURES), NEWLINE]
    assert layout.count(one) == FEATURES + 1


@pytest.mark.parametrize("side", [1, 2, 5, 27])
def test_features_of_frames_are_mixed_as_transformers_does(side: int) -> None:
    settings = LlavaOnevisionConfig(vision_config=dict(image_size=14 * side, patch_size=14))
    layout = feature_layout("anyres_max_9", side**2)
    frame = stored((50, 20), anyres.ONEVISION_GRIDS, "anyres_max_9", images=2)
    frames = [replace(frame, frames=left) for left in (3, 2, 1)]
    features = torch.from_numpy(RNG.normal(size=(3, side**2, 5)).astype(np.float32))
    expected = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=settings), features)
    for image, own, theirs in zip(frames, features, expected, strict=True):
        numbers = layout.numbers(image).tolist()
        if image.frames == 1:
            assert numbers.pop() == NEWLINE
        assert len(numbers) == len(theirs)
        assert layout.count(image) == len(numbers) + (image.frames == 1)
        mixed = layout.mixed(image)
        if side == 1:
            assert (numbers, mixed) == ([0], None)
            continue
        assert numbers == [MIXED] * len(theirs)
        found = (own[mixed.numbers] * torch.from_numpy(mixed.weights)[..., None]).sum(1)
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)
    tiles, [shown] = sizes_in_text(frames, layout)
    assert (tiles, shown) == ([3], Shown(3 * len(theirs) + 1, images=3))


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
