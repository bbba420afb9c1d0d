"""Images that EXIF says are not stored upright, against Pillow's own way to turn them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from megavlm.data.images.decode import decode_pixels, read_header, scale_deep
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import read_frames
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.records.record import MediaFile
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.evaluate import media
from megavlm.evaluate.packs import tiling_of
from tests.data.packing.test_native import GOLDEN, pack

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
PIXELS = PIXELS.repeat(28, 0).repeat(56, 1)


def turned(kind: str, orientation: int, pixels: np.ndarray = PIXELS) -> bytes:
    """Return an image file whose EXIF has this orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_pillow_turns_it(kind: str, orientation: int) -> None:
    encoded = turned(kind, orientation)
    stored = Image.open(io.BytesIO(encoded))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    found = decode_pixels(encoded, upright=True)
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 3
    for source in (encoded, io.BytesIO(encoded)):
        header = read_header(source, upright=True)
        assert (header.height, header.width) == expected.shape[:2]
        assert header.turned == (kind != "TIFF" and orientation in range(2, 9))
    as_stored = read_header(encoded)
    assert np.array_equal(decode_pixels(encoded), np.asarray(stored.convert("RGB")))
    assert (as_stored.width, as_stored.height) == stored.size
    assert as_stored.turned == header.turned


def test_xmp_says_it_too_and_damaged_exif_says_nothing() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", xmp=xmp)
    assert decode_pixels(file.getvalue(), upright=True).shape == (168, 56, 3)
    damaged = turned("JPEG", 6).replace(b"Exif\0\0", b"Exif\0\0\xff\xff")
    header = read_header(damaged, upright=True)
    assert (header.width, header.height, header.turned) == (168, 56, False)


def test_an_image_of_sixteen_bits_keeps_its_turn() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9999
    scaled = scale_deep(turned("PNG", 6, values.repeat(9, 1)))
    assert decode_pixels(scaled, upright=True).shape == (27, 2, 3)


def test_training_and_questions_see_what_the_packer_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    add_special_tokens(tokenizer, "qwen2_vl")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "1.jpg").write_bytes(turned("JPEG", 6))
    turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    record = {"image": "1.jpg", "conversations": turns}
    (tmp_path / "records.jsonl").write_text(json.dumps(record))
    as_stored = pack(tmp_path)
    assert "1 images are not stored upright" in capfd.readouterr().err
    upright = pack(tmp_path, "--exif_rotation", out="upright")
    assert "upright" not in capfd.readouterr().err
    for packs, grid in ((as_stored, (6, 2)), (upright, (2, 6))):
        row = packs.reader.read(0).images[0]
        assert (row["columns"], row["rows"]) == grid
        image = media.image_of(tmp_path / "1.jpg", tiling_of(packs.manifest), 1, "")
        assert (image.columns, image.rows) == grid
    # Turned to the right: the first column of what is stored is the first row, from its end.
    tiles = np.asarray(PackedDataset(tmp_path / "upright").batch(0, 0).tiles)
    stored = np.asarray(as_stored.batch(0, 0).tiles)
    expected = np.rot90(stored.reshape(2, 6, 3, 28, 28), -1, (0, 1))
    expected = np.rot90(expected, -1, (3, 4)).reshape(tiles.shape)
    assert np.abs(tiles.astype(int) - expected).mean() < 2


def test_frames_of_a_folder_are_turned(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(turned("JPEG", 8))
    for upright, size in ((False, (168, 56)), (True, (56, 168))):
        tiling = Tiling(tile_size=28, exif_rotation=upright)
        [frame] = read_frames(MediaFile(path=str(tmp_path)), lambda times: [0], tiling)
        assert (frame.width, frame.height) == size
