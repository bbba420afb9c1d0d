"""Tiles of images against cropping with Pillow, step by step, and broken files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megavlm.data.images.decode import (
    MAX_PIXELS,
    check_pixels,
    decode_tiles,
    read_header,
    read_size,
    scale_deep,
)


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _by_hand(encoded: bytes, columns: int, rows: int, size: int, thumbnail: bool) -> np.ndarray:
    """InternVL's steps: resize, crop one tile after the other, row by row, and the whole image
    last.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    resized = image.resize((size * columns, size * rows))
    tiles = []
    for place in range(columns * rows):
        left = place % columns * size
        top = place // columns * size
        tiles.append(resized.crop((left, top, left + size, top + size)))
    if thumbnail and len(tiles) != 1:
        tiles.append(image.resize((size, size)))
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


FILES = [
    ("RGB", "JPEG"),
    ("RGB", "PNG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("P", "PNG"),
    ("RGBA", "PNG"),
    ("RGB", "WEBP"),
    ("P", "GIF"),
]


@pytest.mark.parametrize(("mode", "kind"), FILES)
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_those_of_cropping_by_hand(mode, kind, thumbnail):
    encoded = _encoded(_picture(61, 45, mode), kind)
    for columns, rows in ((1, 1), (3, 2), (1, 4)):
        tiles = decode_tiles(encoded, columns, rows, 16, thumbnail)
        assert tiles.dtype == np.uint8 and tiles.flags.c_contiguous
        assert tiles.shape == (columns * rows + (thumbnail and columns * rows > 1), 3, 16, 16)
        assert np.array_equal(tiles, _by_hand(encoded, columns, rows, 16, thumbnail))


def test_rotation_in_exif_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = _encoded(_picture(61, 45), "JPEG")
    rotated = _encoded(_picture(61, 45), "JPEG", exif=exif)
    assert read_size(rotated) == (61, 45)
    assert np.array_equal(
        decode_tiles(plain, 2, 1, 16, True), decode_tiles(rotated, 2, 1, 16, True)
    )


def test_size_comes_from_the_header(tmp_path):
    encoded = _encoded(_picture(61, 45), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(encoded[:60])
    assert read_size(encoded) == read_size(path) == (61, 45)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_an_error(kind):
    encoded = _encoded(_picture(200, 200), kind)
    check_pixels(encoded)
    for broken in (encoded[: len(encoded) // 2], encoded[:-400]):
        with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
            check_pixels(broken)
        with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
            decode_tiles(broken, 1, 1, 16, True)


@pytest.mark.parametrize(
    "encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", b"GIF89a"]
)
def test_what_is_no_image_is_an_error(encoded):
    with pytest.raises(ValueError, match="not a readable image: .+") as caught:
        read_size(encoded)
    assert "object at" not in str(caught.value)


def _png_header(width: int, height: int) -> bytes:
    """Return the beginning of a PNG file that claims to have these sizes."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (head, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_decompression_bomb_is_an_error():
    assert read_size(_png_header(2**14, 2**15)) == (2**14, 2**15)
    with pytest.raises(ValueError, match=f"60000 x 60000 pixels; at most {MAX_PIXELS}"):
        read_size(_png_header(60000, 60000))
    with pytest.raises(ValueError, match="60000 x 60000"):
        check_pixels(_png_header(60000, 60000))


def test_large_texts_in_a_png_do_no_harm():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "a" * 5_000_000, zip=True)
    encoded = _encoded(_picture(61, 45), "PNG", pnginfo=texts)
    assert decode_tiles(encoded, 1, 1, 16, True).shape == (1, 3, 16, 16)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_size(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[100, 65636, 131172]], np.int32), [0, 128, 255]),
        (np.array([[-10, 0, 10]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.2, 0.6]], np.float32), [0, 51, 153]),
        (np.array([[-2.0, 0.0, 2.0]], np.float32), [0, 128, 255]),
    ],
)
def test_deep_images_are_scaled_to_eight_bits(values, scaled):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    assert read_header(file.getvalue()).deep
    found = np.asarray(Image.open(io.BytesIO(scale_deep(file.getvalue()))))
    assert found.tolist() == [scaled]
