"""Image files: their size, and their pixels as tiles. The only module that imports PIL.

Pixels are those of InternVL: converted to RGB, resized to the grid with bicubic interpolation (the shape is not kept), cut row by row, the
thumbnail last; a rotation noted in EXIF is not applied. Unlike there, a truncated file is an error, not a picture that ends in grey.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from PIL import PngImagePlugin, UnidentifiedImageError

# Pillow warns above 89 million pixels and refuses twice that, but scans and maps of honest data are larger. This bound costs at most 1.6 GB
# while an image is decoded; it takes the place of Pillow's own, which is one setting for the whole process.
MAX_PIXELS = 2**29
PillowImage.MAX_IMAGE_PIXELS = None
# Colour profiles and texts of real PNG files exceed Pillow's limit of 1 MB, which makes them "decompressed data too large".
MAX_TEXT_BYTES = 2**26
PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES


def read_size(source: bytes | Path) -> tuple[int, int]:
    """Width and height in pixels, from the header of an image file.

    Args:
        source: content of the file, or its path; of a path only the header is read.

    Raises:
        FileNotFoundError: there is no such file (other OSErrors likewise where a path may not be read).
        ValueError: not an image, or one of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, bytes):
        return _open(io.BytesIO(source)).size
    with open(source, "rb") as file:
        return _open(file).size


def decode_tiles(encoded: bytes, columns: int, rows: int, tile_size: int, thumbnail: bool) -> np.ndarray:
    """The tiles of an image, uint8 [I, 3, S, S]: row by row, then the thumbnail where the grid has more than one tile.

    Args:
        encoded: content of the image file.
        columns: tiles beside each other.
        rows: tiles above each other.
        tile_size: side S of a tile in pixels.
        thumbnail: whether a grid of several tiles is followed by the whole image as one tile.

    Raises:
        ValueError: the image cannot be decoded, with the reason.
    """
    image = _decode(encoded)
    grid = np.asarray(image.resize((columns * tile_size, rows * tile_size), PillowImage.Resampling.BICUBIC))
    tiles = grid.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile_size, tile_size)
    if thumbnail and columns * rows > 1:
        small = np.asarray(image.resize((tile_size, tile_size), PillowImage.Resampling.BICUBIC)).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, small[None]])
    return np.ascontiguousarray(tiles)


def check_pixels(encoded: bytes) -> None:
    """Decode an image to see that it can be; raises ValueError with the reason where not."""
    _decode(encoded)


def _open(file: io.BufferedIOBase) -> PillowImage.Image:
    """The image in ``file``, of which only the header is read."""
    try:
        image = PillowImage.open(file)
    except Exception as error:
        raise ValueError(f"not a readable image: {_words(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width} x {image.height} pixels; at most {MAX_PIXELS} pixels are decoded")
    return image


def _decode(encoded: bytes) -> PillowImage.Image:
    """The pixels of an image, as RGB."""
    image = _open(io.BytesIO(encoded))
    try:
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"an image that cannot be decoded: {_words(error)}") from None


def _words(error: Exception) -> str:
    """What a decoder's error says, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"  # its own words hold the address of a buffer
    return " ".join(str(error).split()) or type(error).__name__
