"""Tiles of images that are changed on the way: made square, cut into patches, or augmented."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageEnhance

from megavlm.config.vision import RESAMPLES
from megavlm.data.images.augment import Change
from megavlm.data.images.decode import cut_tiles, decode_pixels


def decode_changed(
    encoded: bytes,
    columns: int,
    rows: int,
    tile_size: int,
    thumbnail: bool,
    *,
    pad_colour: tuple[int, int, int] | None = None,
    crops: bool = False,
    cut: Callable[[PillowImage.Image, np.ndarray | None], np.ndarray] | None = None,
    change: Change | None = None,
    out: np.ndarray | None = None,
    resample: str = "bicubic",
    on_white: bool = False,
    upright: bool = False,
) -> np.ndarray:
    """Decode the changed tiles of an image, as ``decode.decode_tiles``, uint8 [I, 3, S, S].

    Args:
        encoded, columns, rows, tile_size, thumbnail: as for ``decode.decode_tiles``.
        pad_colour: what the image is filled up with to a square; None: it is not.
        crops: whether the square in its middle is taken, see ``centre_crop``.
        cut: makes the tiles of the changed image, in an array if there is one; None: the image is
            resized to the grid.
        change: what else happens to it.
        out, resample, on_white, upright: as for ``decode.decode_tiles``.

    Raises:
        ValueError: the image cannot be decoded, with the reason.
    """
    change = change or Change()
    image = PillowImage.fromarray(decode_pixels(encoded, on_white, upright))
    image = _changed(image, change)
    if pad_colour is not None:
        image = to_square(image, pad_colour)
    if crops:
        image = centre_crop(image, tile_size, resample)
    if cut is not None:
        tiles = cut(image, out)
    else:
        pixels = np.asarray(image)
        tiles = cut_tiles(pixels, columns, rows, tile_size, thumbnail, out, resample)
    if change.qualities:
        for tile, quality in zip(tiles, change.qualities, strict=True):
            tile[:] = _compress(tile, quality)
    return tiles


def _changed(image: PillowImage.Image, change: Change) -> PillowImage.Image:
    """Crop, flip and colour an image as a change says."""
    if change.box:
        left, top, right, bottom = change.box
        # At least a pixel is left of an image of one.
        sides = (
            int(left * image.width),
            int(top * image.height),
            max(1, round(right * image.width)),
            max(1, round(bottom * image.height)),
        )
        image = image.crop(
            (min(sides[0], sides[2] - 1), min(sides[1], sides[3] - 1), sides[2], sides[3])
        )
    if change.is_flipped:
        image = image.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)
    if change.colours:
        for kind, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color),
            change.colours,
            strict=True,
        ):
            image = kind(image).enhance(factor)
    return image


def to_square(image: PillowImage.Image, colour: tuple[int, int, int]) -> PillowImage.Image:
    """Put an image into the middle of a square of one colour."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = PillowImage.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def centre_crop(image: PillowImage.Image, size: int, resample: str) -> PillowImage.Image:
    """Resize an image so that its shorter side has ``size`` pixels, and take the square in its
    middle, as CLIP's image processor does.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    for shape in ((width, image.height), (width, height)):
        image = image.resize(shape, RESAMPLES[resample])
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _compress(tile: np.ndarray, quality: int) -> np.ndarray:
    """Compress a tile as JPEG and decode it again, uint8 [3, S, S]."""
    file = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).save(
        file, "JPEG", quality=quality
    )
    return np.asarray(PillowImage.open(file)).transpose(2, 0, 1)
