"""Image files: their size, and their pixels as tiles. The only module that imports PIL.

Pixels are those of InternVL: converted to RGB, resized to the grid with bicubic interpolation, or
bilinear for encoders that were pretrained so (the shape is not kept), cut row by row, the thumbnail
last; a rotation noted in EXIF is not applied unless that is asked for, and transparency is dropped
unless it is to be shown on white, as Qwen2-VL has it. Resizing is along rows first, then along
columns, as in all Pillow up to version 12; later ones choose the order for each image, which
changes a few pixels by a few levels. Unlike there, a truncated file is an error, not a picture that
ends in grey.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, PngImagePlugin, UnidentifiedImageError
from PIL import Image as PillowImage

from megavlm.config.vision import RESAMPLES
from megavlm.data.images.jpeg import (
    decode_jpeg,
    is_whole,
    load_jpeg_decoder,
    may_be_turned,
    plain_size,
)

# Pillow warns above 89 million pixels and refuses twice that, but scans and maps of honest data are
# larger. This bound costs at most 1.6 GB while an image is decoded; it takes the place of Pillow's
# own, which is one setting for the whole process.
MAX_PIXELS = 2**29
PillowImage.MAX_IMAGE_PIXELS = None
# Colour profiles and texts of real PNG files exceed Pillow's limit of 1 MB, which makes them
# "decompressed data too large".
MAX_TEXT_BYTES = 2**26
# Of a file that is open, in which the size is looked for first.
HEAD_BYTES = 2**13
PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
_Turn = PillowImage.Transpose
# By the value of EXIF's orientation: how an image is turned to be upright.
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
# Those that exchange width and height.
_ON_ITS_SIDE = (_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90)
# Formats whose orientation Pillow leaves to others; it turns a TIFF itself.
_TURNED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the header of an image file says.

    Args:
        width: in pixels.
        height: in pixels.
        deep: whether Pillow opens it with more than 8 bits a channel (grey of 16 or 32 bits, or
            float), which a conversion to RGB clips to 0 ... 255.
        turned: whether EXIF says that the pixels are not stored upright.
    """

    width: int
    height: int
    deep: bool
    turned: bool = False


def read_header(source: bytes | Path | BinaryIO, upright: bool = False) -> Header:
    """Read the header of an image file.

    Args:
        source: content of the file, its path, or the opened file.
        upright: as for ``decode_pixels``; width and height are those of what it gives.

    Raises:
        FileNotFoundError: there is no such file (another OSError if the path may not be read).
        ValueError: not an image, or one of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return read_header(file, upright)
    head = source if isinstance(source, bytes) else source.read(HEAD_BYTES)
    if not head:
        raise ValueError("not a readable image: the file is empty")
    size = plain_size(head)
    if size and size[0] * size[1] <= MAX_PIXELS and not may_be_turned(head):
        return Header(width=size[0], height=size[1], deep=False)
    if not isinstance(source, bytes):
        source.seek(-len(head), io.SEEK_CUR)
    image = open_image(io.BytesIO(source) if isinstance(source, bytes) else source)
    turn = _turn_of(image)
    width, height = image.size
    if upright and turn in _ON_ITS_SIDE:
        width, height = height, width
    return Header(width=width, height=height, deep=_is_deep(image), turned=turn is not None)


def _turn_of(image: PillowImage.Image) -> PillowImage.Transpose | None:
    """Return how an image is turned to be upright; None: it is, or nothing is known."""
    if image.format not in _TURNED_FORMATS:
        return None
    # Pillow would read all pixels of a PNG to find what stands behind them.
    if image.format == "PNG" and not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys():
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF
        return None


def _is_deep(image: PillowImage.Image) -> bool:
    """Tell whether an image has more than 8 bits a channel."""
    return image.mode[0] in "IF"


def read_size(source: bytes | Path | BinaryIO, upright: bool = False) -> tuple[int, int]:
    """Return width and height in pixels from the header of an image file; arguments and errors as
    in ``read_header``.
    """
    header = read_header(source, upright)
    return header.width, header.height


def scale_deep(encoded: bytes) -> bytes:
    """Return an image of more than 8 bits a channel as a grey PNG of 8 bits.

    Sixteen bits are divided by 257. Of 32 bits and floats, the image's least value becomes 0 and
    its largest 255; floats inside 0 ... 1 are multiplied by 255.

    Raises:
        ValueError: the image cannot be decoded, or holds values that are not finite.
    """
    image = open_image(io.BytesIO(encoded))
    try:
        values = np.asarray(image).astype(np.float64)
    except Exception as error:
        raise ValueError(f"an image that cannot be decoded: {describe(error)}") from None
    if not np.isfinite(values).all():
        raise ValueError("an image with values that are not finite cannot be scaled")
    low = float(values.min())
    high = float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and high < 2**16):
        low = 0.0
        high = 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low = 0.0
        high = 1.0
    scaled = (values - low) * (255 / max(high - low, 1e-9))
    file = io.BytesIO()
    scaled_image = PillowImage.fromarray(np.rint(scaled).astype(np.uint8))
    scaled_image.save(file, "PNG", exif=image.info.get("exif"))
    return file.getvalue()


def decode_tiles(
    encoded: bytes,
    columns: int,
    rows: int,
    tile_size: int,
    thumbnail: bool,
    out: np.ndarray | None = None,
    resample: str = "bicubic",
    on_white: bool = False,
    upright: bool = False,
) -> np.ndarray:
    """Decode the tiles of an image, uint8 [I, 3, S, S]: row by row, then the thumbnail if the grid
    has more than one tile.

    Args:
        encoded: content of the image file.
        columns: tiles beside each other.
        rows: tiles above each other.
        tile_size: side S of a tile in pixels.
        thumbnail: whether a grid of several tiles is followed by the whole image as one tile.
        out: where the tiles go; None: a new array.
        resample: how the image is resized, ``bicubic`` or ``bilinear``.
        on_white, upright: as for ``decode_pixels``.

    Raises:
        ValueError: the image cannot be decoded, with the reason, or ``out`` has another shape.
    """
    pixels = decode_pixels(encoded, on_white, upright)
    return cut_tiles(pixels, columns, rows, tile_size, thumbnail, out, resample)


def decode_pixels(encoded: bytes, on_white: bool = False, upright: bool = False) -> np.ndarray:
    """Decode the pixels of an image as RGB, uint8 [height, width, 3]; raise ValueError if that
    fails.

    Args:
        encoded: content of the image file.
        on_white: whether what is transparent shows white; otherwise the colours below it.
        upright: whether the image is turned as its EXIF says, as transformers' ``load_image`` does.
    """
    pixels = decode_jpeg(encoded, MAX_PIXELS)
    if pixels is None:
        pixels = np.asarray(_decode(encoded, on_white))
    turn = _turn_of(open_image(io.BytesIO(encoded))) if upright else None
    return pixels if turn is None else np.asarray(PillowImage.fromarray(pixels).transpose(turn))


def cut_tiles(
    pixels: np.ndarray,
    columns: int,
    rows: int,
    tile_size: int,
    thumbnail: bool,
    out: np.ndarray | None = None,
    resample: str = "bicubic",
) -> np.ndarray:
    """``decode_tiles`` of pixels, uint8 [height, width, 3]."""
    whole = columns * rows
    shape = (whole + (thumbnail and whole > 1), 3, tile_size, tile_size)
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape:
        raise ValueError(f"room for tiles of shape {out.shape}, but the image gives {shape}")
    resize = _resizer()
    resize(pixels, columns, rows, tile_size, out[:whole], resample=resample)
    if len(out) > whole:
        resize(pixels, 1, 1, tile_size, out[whole:], resample=resample)
    return out


def resized(
    pixels: np.ndarray, columns: int, rows: int, tile_size: int, resample: str = "bicubic"
) -> np.ndarray:
    """Resize pixels, uint8 [height, width, 3], to a grid of tiles; uint8 [rows * S, columns * S,
    3]. Arguments as for ``decode_tiles``.
    """
    tiles = cut_tiles(pixels, columns, rows, tile_size, False, resample=resample)
    grid = tiles.reshape(rows, columns, 3, tile_size, tile_size).transpose(0, 3, 1, 4, 2)
    return grid.reshape(rows * tile_size, columns * tile_size, 3)


def cut_fitted(
    pixels: np.ndarray,
    columns: int,
    rows: int,
    tile_size: int,
    size: tuple[int, int],
    out: np.ndarray | None = None,
    resample: str = "bicubic",
) -> np.ndarray:
    """Cut an image into the whole image as one tile, and a grid in whose middle it stands, with
    black beside it; uint8 [1 + rows * columns, 3, S, S].

    Args:
        pixels: uint8 [height, width, 3].
        columns, rows, tile_size, out, resample: as for ``decode_tiles``.
        size: width and height in pixels that the image gets in the grid.

    Raises:
        ValueError: ``out`` has another shape.
    """
    shape = (1 + columns * rows, 3, tile_size, tile_size)
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape:
        raise ValueError(f"room for tiles of shape {out.shape}, but the image gives {shape}")
    resize = _resizer()
    resize(pixels, 1, 1, tile_size, out[:1], resample=resample)
    out[1:] = 0
    resize(pixels, columns, rows, tile_size, out[1:], size, resample)
    return out


def _resizer() -> Callable[..., None]:
    """Return ``resize.resize_to_tiles``, or Pillow's as long as that is not loaded."""
    return load_decoders() if load_decoders.cache_info().currsize else _resize_with_pillow


@cache
def load_decoders() -> Callable[..., None]:
    """Load the libraries and the machine code that are fastest at many images, and return what
    resizes.

    It takes half a second, mostly numba's. Until then Pillow resizes, to the same pixels; without
    numba it always does.
    """
    load_jpeg_decoder()
    try:
        from megavlm.data.images.resize import resize_to_tiles
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return _resize_with_pillow
    resize_to_tiles(np.zeros((2, 2, 3), np.uint8), 1, 1, 1, np.empty((1, 3, 1, 1), np.uint8))
    return resize_to_tiles


def check_pixels(encoded: bytes) -> None:
    """See that an image can be decoded, by decoding it where there is no faster way; raises
    ValueError with the reason where not.
    """
    if is_whole(encoded, MAX_PIXELS):
        return
    image = open_image(io.BytesIO(encoded))
    try:
        # A JPEG file is read to its end, but not all pixels are worked out.
        image.draft("RGB", (1, 1))
        image.load()
    except Exception as error:
        raise ValueError(f"an image that cannot be decoded: {describe(error)}") from None


def _resize_with_pillow(
    pixels: np.ndarray,
    columns: int,
    rows: int,
    tile_size: int,
    tiles: np.ndarray,
    inner: tuple[int, int] | None = None,
    resample: str = "bicubic",
) -> None:
    """``resize.resize_to_tiles``."""
    image = PillowImage.fromarray(pixels)
    across = columns * tile_size
    down = rows * tile_size
    wide, high = inner or (across, down)
    for size in ((wide, image.height), (wide, high)):
        image = image.resize(size, RESAMPLES[resample])
    if inner:
        # As with numba, pixels beside the image are left as they are.
        grid = tiles.reshape(rows, columns, 3, tile_size, tile_size).transpose(0, 3, 1, 4, 2)
        whole = PillowImage.fromarray(grid.reshape(down, across, 3))
        whole.paste(image, ((across - wide) // 2, (down - high) // 2))
        image = whole
    grid = np.asarray(image).reshape(rows, tile_size, columns, tile_size, 3)
    tiles[:] = grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile_size, tile_size)


def open_image(file: BinaryIO) -> PillowImage.Image:
    """Open the image in ``file``; only its header is read."""
    try:
        image = PillowImage.open(file)
    except Exception as error:
        raise ValueError(f"not a readable image: {describe(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels; at most {MAX_PIXELS} pixels are"
            " decoded"
        )
    return image


def _decode(encoded: bytes, on_white: bool) -> PillowImage.Image:
    """Decode the pixels of an image, as RGB; ``on_white`` as for ``decode_pixels``."""
    image = open_image(io.BytesIO(encoded))
    try:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if on_white and has_alpha and not _is_deep(image):
            white = PillowImage.new("RGBA", image.size, "white")
            image = PillowImage.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"an image that cannot be decoded: {describe(error)}") from None


def describe(error: Exception) -> str:
    """Return a decoder's error message on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"  # its own words hold the address of a buffer
    return " ".join(str(error).split()) or type(error).__name__
