"""Records with image files on disk become samples, or are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.encode import ALL, Encoder, Size
from megavlm.data.packing.media import Images
from megavlm.data.records.filters import Filter
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.reject import Reject
from megavlm.data.sample import Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = {"square.png": (16, 16), "wide.png": (64, 32), "tall.png": (20, 100)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, (width, height) in SIZES.items():
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "tall.png").read_bytes()[:3000])
    (folder / "text.png").write_text("no image")
    (folder / "bare.png").touch()
    (folder / "film").mkdir()
    (folder / "film" / "0.png").write_bytes((folder / "wide.png").read_bytes())
    (folder / "film" / "1.png").write_bytes((folder / "cut.png").read_bytes())
    return folder


def _encode(
    root,
    *,
    images=Images.LOAD,
    capacity=1000,
    tile_cap=None,
    max_tiles=None,
    truncate=0,
    keep=ALL,
    measures=False,
    **fields,
) -> Sample | Size | Reject:
    template = ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), features_per_tile=4)
    tiling = Tiling(tile_size=16, max_tiles=6)
    encoder = Encoder(template, tiling, capacity, tile_cap, truncate=truncate)
    chat = [
        {"from": "human", "value": fields.pop("question", "what")},
        {"from": "gpt", "value": "the answer"},
    ]
    text = json.dumps({"conversations": chat, **fields}).encode()
    annotations = Annotations(
        name="a", path="a.jsonl", root=str(root), max_tiles=max_tiles, keep=keep
    )
    encode = encoder.measure_raw if measures else encoder.encode_raw
    found = encode(
        RawRecord(offset=0, number=9, content=text), annotations, source=2, images=images
    )
    return found if isinstance(found, Reject) else found[0]


def test_a_sample_with_an_image(root):
    sample = _encode(root, image="wide.png")
    (image,) = sample.images
    assert (sample.source, sample.line) == (2, 9)
    assert (image.width, image.height, image.columns, image.rows, image.tiles) == (64, 32, 2, 1, 3)
    assert image.encoded == (root / "wide.png").read_bytes()
    assert sample.tokens.dtype == np.int32 and sample.supervised.dtype == np.bool_
    assert np.count_nonzero(sample.tokens == 5) == sample.tiles * 4 == 12
    assert 0 < np.count_nonzero(sample.supervised) < sample.length == len(sample.supervised)


def test_text_only(root):
    sample = _encode(root)
    assert (sample.images, sample.tiles) == ((), 0)


def test_several_images_share_the_tiles(root):
    alone = _encode(root, image="tall.png")
    shared = _encode(
        root, image=["tall.png", "square.png", "tall.png"], question="<image><image><image>"
    )
    assert [image.tiles for image in alone.images] == [6]
    assert [image.tiles for image in shared.images] == [3, 1, 3]
    assert [image.tiles for image in _encode(root, image="tall.png", max_tiles=1).images] == [1]


@pytest.mark.parametrize("images", [Images.HEADER, Images.DECODE])
def test_a_sample_is_as_long_without_its_bytes(root, images):
    loaded = _encode(root, image="tall.png")
    measured = _encode(root, image="tall.png", images=images)
    assert np.array_equal(loaded.tokens, measured.tokens)
    assert (measured.tiles, measured.images[0].encoded) == (loaded.tiles, b"")


BAD = [
    ({"image": "nowhere.png"}, "missing_image", ["nowhere.png", "No such file"]),
    ({"image": ""}, None, []),
    (
        {"video": "a.mp4", "question": "<video>", "clip": [0, 10**400]},
        "conversation",
        ["a number that is too large"],
    ),
    ({"image": "."}, "missing_image", ["directory"]),
    ({"image": "text.png"}, "unreadable_image", ["text.png", "no known image format"]),
    ({"image": "bare.png"}, "unreadable_image", ["bare.png", "the file is empty"]),
    ({"image": "a\0b.png"}, "unreadable_image", ["embedded null"]),
    (
        {"image": ["wide.png", "square.png"], "question": "<image> a"},
        "placeholder_count",
        ["1 <image>", "2 images"],
    ),
    ({"question": "<image> a"}, "placeholder_count", ["1 <image>", "0 images"]),
    ({"question": "a <IMG_CONTEXT>"}, "image_token_in_text", ["<IMG_CONTEXT> 1 times"]),
    ({"question": "what " * 2000}, "too_long", ["but a pack holds 1000", "0 tiles"]),
    (
        {"image": "tall.png", "capacity": 150},
        "too_long",
        ["24 of them for 6 tiles", "but a pack holds 150: raise --capacity"],
    ),
    (
        {"image": "tall.png", "tile_cap": 5},
        "too_many_tiles",
        ["6 tiles of 1 images, but a pack holds 5"],
    ),
]


@pytest.mark.parametrize(("fields", "reason", "words"), BAD)
def test_what_cannot_be_a_sample(root, fields, reason, words):
    outcome = _encode(root, **fields)
    if reason is None:
        assert isinstance(outcome, Sample)
        return
    assert isinstance(outcome, Reject)
    assert (outcome.file, outcome.line, outcome.reason) == ("a.jsonl", 9, reason)
    assert str(outcome).startswith(f"a.jsonl:9: {reason}: ")
    assert all(word in outcome.detail for word in words), outcome.detail


def test_truncated_images_are_found_by_decoding_only(root):
    outcome = _encode(root, image="cut.png", images=Images.DECODE)
    assert (outcome.reason, "truncated" in outcome.detail) == ("unreadable_image", True)
    assert isinstance(_encode(root, image="cut.png", images=Images.HEADER), Sample)
    film = dict(video="film", question="<video>")
    outcome = _encode(root, **film, images=Images.DECODE)
    assert (outcome.reason, "truncated" in outcome.detail) == ("unreadable_video", True)
    assert isinstance(_encode(root, **film, images=Images.HEADER), Sample)
    outcome = _encode(root, **film, clip=[100, 200])
    assert f"{root / 'film'}: no frame between" in outcome.detail


def test_a_sample_that_fills_a_pack_exactly(root):
    length = _encode(root, image="wide.png").length
    assert isinstance(_encode(root, image="wide.png", capacity=length), Sample)
    assert _encode(root, image="wide.png", capacity=length - 1).reason == "too_long"
    assert isinstance(_encode(root, image="wide.png", tile_cap=3), Sample)
    assert _encode(root, image="wide.png", tile_cap=2).reason == "too_many_tiles"


@pytest.mark.parametrize("measures", [True, False])
def test_what_filters_leave_out_is_no_sample(root, measures):
    length = _encode(root, image="wide.png", measures=measures).length
    for truncate in (0, length):  # which is measured in another way
        for bounds, reason in (
            (dict(max_tokens=length - 1), "filtered_length"),
            (dict(min_tokens=length + 1), "filtered_length"),
            (dict(max_side=63), "filtered_size"),
            (dict(min_tokens=length, max_tokens=length, max_side=64), None),
        ):
            keep = Filter(**bounds)
            options = dict(keep=keep, measures=measures, truncate=truncate)
            found = _encode(root, image="wide.png", **options)
            assert (found.reason if isinstance(found, Reject) else None) == reason


def test_truncate_cuts_the_end_off_and_keeps_images_whole(root):
    whole = _encode(root, image="wide.png")
    begin = int(np.flatnonzero(whole.supervised)[0])
    cut = _encode(root, image="wide.png", truncate=begin + 2)
    assert cut.tokens.tolist() == whole.tokens[: begin + 2].tolist()
    assert cut.supervised.sum() == 2 and cut.images == whole.images
    assert _encode(root, image="wide.png", truncate=begin + 2, measures=True).length == begin + 2
    assert _encode(root, image="wide.png", truncate=whole.length).tokens.size == whole.length
    lost = _encode(root, image="wide.png", truncate=begin)
    assert lost.reason == "empty_answer" and f"--truncate {begin} of" in lost.detail
    inside = int(np.flatnonzero(whole.tokens == 5)[1])
    halved = _encode(root, image="wide.png", truncate=inside)
    assert halved.reason == "too_long" and "image 1 in two" in halved.detail
