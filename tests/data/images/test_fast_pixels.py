"""The fast ways to pixels, by libjpeg-turbo and numba, give those of Pillow to the last bit."""

from __future__ import annotations

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from megavlm.config.vision import RESAMPLES
from megavlm.data.images import decode, jpeg


def picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Soft colours with hard edges and some noise, so that overshoots are cut off at black and
    white.
    """
    coarse = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    ).astype(np.int64)
    return np.clip(smooth * 2 - 128 + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("seed", range(12))
def test_resizing(seed, resample):
    resize_to_tiles = pytest.importorskip(
        "megavlm.data.images.resize", exc_type=ImportError
    ).resize_to_tiles
    rng = np.random.default_rng(seed)
    (width, height) = rng.integers(1, 500, 2)
    (columns, rows) = rng.integers(1, 5, 2)
    size = int(rng.choice([14, 48, 448]))
    pixels = picture(rng, int(width), int(height))
    found, expected = (np.empty((columns * rows, 3, size, size), np.uint8) for _ in range(2))
    place = (pixels, int(columns), int(rows), size)
    resize_to_tiles(*place, found, resample=resample)
    decode._resize_with_pillow(*place, expected, resample=resample)
    assert np.array_equal(found, expected)


def test_enlarging_is_one_call_of_pillow():
    """Where an image grows in both directions every version of Pillow resizes along rows first."""
    pixels = picture(np.random.default_rng(0), 61, 45)
    found = np.empty((6, 3, 32, 32), np.uint8)
    decode._resize_with_pillow(pixels, 3, 2, 32, found)
    whole = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(found[4].transpose(1, 2, 0), whole[32:, 32:64])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"subsampling": 0},
        {"progressive": True},
        {"quality": 95, "optimize": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg(options, mode):
    pytest.importorskip("simplejpeg")
    file = io.BytesIO()
    Image.fromarray(picture(np.random.default_rng(1), 203, 117)).convert(mode).save(
        file, "JPEG", **options
    )
    found = jpeg.decode_jpeg(file.getvalue(), 10**6)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_what_pillow_has_to_look_at():
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(picture(np.random.default_rng(2), 90, 70))
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert jpeg.decode_jpeg(file.getvalue(), 90 * 70) is not None
    assert jpeg.decode_jpeg(file.getvalue(), 90 * 70 - 1) is None
    assert jpeg.decode_jpeg(file.getvalue()[:-100], 10**6) is None
    image.convert("CMYK").save(cmyk := io.BytesIO(), "JPEG")
    assert jpeg.decode_jpeg(cmyk.getvalue(), 10**6) is None
    image.save(png := io.BytesIO(), "PNG")
    assert jpeg.decode_jpeg(png.getvalue(), 10**6) is None


EXIF = b"Exif\0\0" + bytes(50)
MARKERS = (0, 0xC0, 0xC2, 0xC4, 0xC8, 0xD0, 0xD3, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE1, 0xFE)


def damaged(encoded: bytes, rng: random.Random) -> bytes:
    """Change, take out or put in some bytes of a file, in its headers as often as in its compressed
    pixels.
    """
    data = bytearray(encoded)
    for _ in range(rng.choice([1, 1, 2, 5])):
        end = len(data) if rng.random() < 0.5 else data.find(b"\xff\xda") + 16
        place = rng.randrange(2, max(3, min(end, len(data))))
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + 1] = rng.randbytes(1)
        elif kind == 1:
            del data[place : rng.choice([place + rng.randrange(1, 40), len(data)])]
        elif kind == 2:
            data[place : place + 2] = bytes(
                [
                    0xFF,
                    rng.choice(
                        [
                            0,
                            0xC0,
                            0xC2,
                            0xC4,
                            0xC8,
                            0xD0,
                            0xD3,
                            0xD9,
                            0xDA,
                            0xDB,
                            0xDC,
                            0xDD,
                            0xE1,
                            0xFE,
                        ]
                    ),
                ]
            )
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.randrange(1, 30))
        else:
            data[place : place + 20] = data[rng.randrange(len(data) or 1) :][:20]
    return bytes(data) + rng.choice([b"", b"", b"\xff\xd9"])


def test_no_jpeg_is_called_whole_that_pillow_refuses():
    pytest.importorskip("simplejpeg")
    rng = random.Random(5)
    files = []
    verdicts = []
    for seed, options in enumerate(
        (
            {},
            {"subsampling": 0},
            {"optimize": True},
            {"restart_marker_blocks": 3},
            {"exif": EXIF},
        )
    ):
        for mode in ("RGB", "L"):
            Image.fromarray(picture(np.random.default_rng(seed), 31 + 9 * seed, 40)).convert(
                mode
            ).save(file := io.BytesIO(), "JPEG", **options)
            files.append(file.getvalue())
            assert jpeg.is_whole(files[-1], 10**6)
    for _ in range(4000):
        encoded = damaged(rng.choice(files), rng)
        if jpeg.is_whole(encoded, 10**6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(encoded)).load()
        verdicts.append(jpeg.is_whole(encoded, 10**6))
    assert 1000 < sum(verdicts) < 3000


def test_sizes_are_those_of_pillow_and_it_opens_all_files_that_have_one():
    rng = random.Random(6)
    files = []
    profile = rng.randbytes(300)
    for seed, options in enumerate(
        (
            {"dpi": (72, 72)},
            {"dpi": (72, 72), "exif": EXIF},
            {"icc_profile": profile, "comment": b"words"},
            {"subsampling": 0, "restart_marker_blocks": 3},
            {"exif": EXIF},
            {"progressive": True},
            {"mode": "CMYK"},
        )
    ):
        image = Image.fromarray(picture(np.random.default_rng(seed), 31 + 9 * seed, 40))
        for mode in ("RGB", "L"):
            image.convert(options.get("mode", mode)).save(
                file := io.BytesIO(), "JPEG", **{k: v for k, v in options.items() if k != "mode"}
            )
            files.append(file.getvalue())
            size = jpeg.plain_size(files[-1])
            assert size == (image.size if seed < 4 else None)
    told = 0
    for _ in range(8000):
        encoded = damaged(rng.choice(files), rng)
        size = jpeg.plain_size(encoded)
        if size is not None:
            told += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Image.open(io.BytesIO(encoded))
            assert found.format == "JPEG" and found.mode in ("RGB", "L") and found.size == size
            assert jpeg.plain_size(encoded[:200]) is None
    assert 1000 < told < 6000


FRAME = bytes.fromhex("0007000903011100021100031100")


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xDE, b"\x08" + FRAME),
        (0xF0, b"\xff\xc0\0\x11\x08" + FRAME),
        (0xFF, b"\xc0\0\x11\x08" + FRAME),
    ],
)
def test_no_size_is_told_where_pillow_finds_another_frame(marker: int, content: bytes):
    image = Image.fromarray(picture(np.random.default_rng(3), 31, 40))
    image.save(file := io.BytesIO(), "JPEG")
    place = file.getvalue().index(b"\xff\xda")
    size = b"" if marker == 0xFF else (2 + len(content)).to_bytes(2)
    # As a segment, FF C0 00 would be of 49152 bytes.
    rest = bytes(0xC002 - 2 - len(content)) if marker == 0xFF else b""
    segment = bytes([0xFF, marker]) + size + content + rest
    encoded = file.getvalue()[:place] + segment + file.getvalue()[place:]
    assert Image.open(io.BytesIO(encoded)).size == (9, 7)
    assert jpeg.plain_size(encoded) is None


@pytest.mark.parametrize("options", [{"progressive": True}, {"mode": "CMYK"}])
def test_what_is_decoded_to_know_whether_it_can_be(options):
    pytest.importorskip("simplejpeg")
    image = Image.fromarray(picture(np.random.default_rng(2), 90, 70)).convert(
        options.pop("mode", "RGB")
    )
    image.save(file := io.BytesIO(), "JPEG", **options)
    assert not jpeg.is_whole(file.getvalue(), 10**6)
    decode.check_pixels(file.getvalue())
