"""Three hundred inputs that are broken in many ways: each is left out with a reason, none ends the
packing, and none reaches a pack.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import single_source
from megavlm.data.records.reject import REASONS
from megavlm.data.store.reader import Reader

GOLDEN = Path(__file__).parents[2] / "golden"
GOOD = 30
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def chat(question: str = "<image>\nwhat", answer: str = "this") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(seed: int, kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Make a small PNG that claims to have this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (head, b"IDAT" + zlib.compress(b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def film(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = 32
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        for place in range(12):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((32, 32, 3), 9 * place, np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return path.read_bytes()


def broken_images(folder: Path) -> Iterator[dict]:
    """Yield records with a broken image: truncated, a bomb, not an image, or missing."""
    files: dict[str, bytes] = {}
    for seed, kind in enumerate(KINDS):
        whole = picture(seed, kind)
        for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            files[f"cut-{kind}-{share}.img"] = whole[: max(4, int(share * len(whole)))]
    for place, size in enumerate(((60000, 60000), (2**31 - 1, 2), (2**30, 2**30), (0, 5), (5, 0))):
        files[f"bomb-{place}.png"] = bomb(*size)
    rng = random.Random(0)
    for place in range(40):
        files[f"noise-{place}.jpg"] = rng.randbytes(rng.choice([0, 1, 2, 10, 1000, 20000]))
    for place, head in enumerate(
        (
            b"\xff\xd8\xff\xe0",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"RIFF\x10\0\0\0WEBPVP8 ",
            b"BM",
            b"II*\0",
        )
    ):
        files[f"head-{place}.jpg"] = head + rng.randbytes(200)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield {"image": name, "conversations": chat()}
    for name in ("nowhere.jpg", "folder", "a\0b.jpg", "x" * 5000, "good.jpg/inside.jpg", "pipe"):
        yield {"image": name, "conversations": chat()}
        yield {"image": ["good.jpg", name], "conversations": chat("<image><image>")}


def broken_paths() -> Iterator[dict]:
    """Yield records whose paths lead out of the root or are not paths."""
    for path in (
        "../outside.jpg",
        "a/../../outside.jpg",
        "/etc/passwd",
        "/dev/zero",
        "./../outside.jpg",
        "folder/../../outside.jpg",
    ):
        yield {"image": path, "conversations": chat()}
        yield {"image": ["good.jpg", path], "conversations": chat("<image><image>")}
        yield {"video": path, "conversations": chat("<video>\nwhat")}
    for image in (5, 1.5, True, {"url": "x"}, [None], [["good.jpg"]], [{}], {"path": ""}, [5]):
        yield {"image": image, "conversations": chat()}
    for video in (5, True, {"path": 3}, ["a.mp4", "b.mp4"], [None], {"frames": []}):
        yield {"video": video, "conversations": chat("<video>\nwhat")}


def broken_videos(folder: Path) -> Iterator[dict]:
    """Yield records whose video is truncated, has no frames, or is not a video."""
    whole = film(folder / "good.mp4")
    still = folder / "sound.wav"
    still.write_bytes(
        b"RIFF"
        + struct.pack("<I", 44)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
        + b"data"
        + b"\x08\0\0\0"
        + bytes(8)
    )
    files = {f"cut-{place}.mp4": whole[: len(whole) * place // 10] for place in range(9)}
    files |= {
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "head.gif": b"GIF89a",
        "zeros.mp4": bytes(5000),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "no frames").mkdir()
    (folder / "bad frames").mkdir()
    (folder / "bad frames" / "1.jpg").write_bytes(b"no image")
    for name in (*files, "sound.wav", "no frames", "bad frames", "nowhere.mp4", "pipe"):
        yield {"video": name, "conversations": chat("<video>\nwhat")}
    for clip in (
        [5, 9],
        [3, 1],
        [0],
        "0-1",
        [-1, 2],
        [None, 1],
        [1, 1],
        {"start": 0},
        [True, False],
    ):
        yield {"video": "good.mp4", "clip": clip, "conversations": chat("<video>\nwhat")}
    for text in ("<video><video>", "<video> and <image>", "<image><image>"):
        yield {"video": "good.mp4", "conversations": chat(text)}
    yield {"video": "good.mp4", "image": "good.jpg", "conversations": chat("<image>")}


def broken_texts() -> Iterator[dict]:
    """Yield records whose texts do not fit their images, are empty, or are of the wrong type."""
    for places, images in ((0, 2), (2, 1), (3, 2), (1, 0), (9, 1), (1, 3)):
        yield {"image": ["good.jpg"] * images, "conversations": chat("<image>" * places + " what")}
    yield {"image": ["good.jpg"] * 2, "text": "<image> a text"}
    for answer in ("", " ", "\n\t", "\u2003"):
        yield {"conversations": chat("what", answer)}
        yield {"image": "good.jpg", "caption": answer}
        yield {"text": answer}
    for token in ("<img>", "</img>", "<IMG_CONTEXT>"):
        yield {"conversations": chat(f"what {token}")}
        yield {"conversations": chat("what", f"this {token}")}
        yield {"text": f"a {token} b"}
    human, gpt = chat("a", "b")
    turns = (
        [gpt, human],
        [human],
        [gpt],
        [human, human],
        [human, gpt, human],
        [],
        {},
        "text",
        5,
        None,
        [None],
        [[]],
        ["a", "b"],
    )
    odd = (
        {"from": "tool", "value": "a"},
        {"from": "human"},
        {"value": "a"},
        {"from": 3, "value": "a"},
        {"from": "human", "value": 3},
    )
    for value in (
        *turns,
        *([entry, gpt] for entry in odd),
        [human, {"from": "gpt", "value": None}],
        [human, {"from": "gpt", "value": ["a"]}],
    ):
        yield {"conversations": value}
    for value in (5, [], {}, True, ["a"]):
        yield {"image": "good.jpg", "caption": value}
        yield {"text": value}
    yield {
        "conversations": [{"from": "pretrain", "value": "a"}, {"from": "pretrain", "value": "b"}]
    }
    yield {"conversations": chat("what " * 3000)}
    yield {"conversations": chat("what", "\ud800")}
    yield {}


def broken_lines() -> Iterator[bytes]:
    """Lines that are no records at all."""
    good = json.dumps({"conversations": chat("what")}).encode()
    yield from (good[:cut] for cut in range(1, len(good), 2))
    yield from (
        b"\xff\xfe",
        good.replace(b"what", b"wh\xe4t"),
        good.replace(b"what", b"\xf0\x28\x8c\x28"),
        b"\0" * 50,
        b"\xed\xa0\x80",
    )
    yield from (
        b"null",
        b"true",
        b"5",
        b'"text"',
        b"[]",
        b"[1, 2]",
        b"NaN",
        b"{]",
        b"{'a': 1}",
        good + good,
        good + b",",
        b"<xml/>",
    )
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1" * 5000):
        yield good[:-1] + b', "width": ' + number + b"}"
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    yield b'{"conversations": "' + b"x" * (2**26 + 10) + b'"}'


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """Pack good records with broken ones between them; return the dataset and the broken lines."""
    folder = tmp_path_factory.mktemp("corrupted")
    root = folder / "root"
    (root / "folder").mkdir(parents=True)
    (root / "good.jpg").write_bytes(picture(3, "JPEG"))
    (folder / "outside.jpg").write_bytes(picture(3, "JPEG"))
    os.mkfifo(root / "pipe")
    records = [*broken_images(root), *broken_paths(), *broken_videos(root), *broken_texts()]
    bad = [json.dumps(record).encode() for record in records] + list(broken_lines())
    random.Random(0).shuffle(bad)
    good = [
        json.dumps(
            {"image": "good.jpg", "conversations": chat("<image>\ngood", f"answer {place}")}
        ).encode()
        for place in range(GOOD)
    ]
    step = len(bad) // GOOD
    lines = [
        line
        for place in range(GOOD)
        for line in (good[place], *bad[place * step : (place + 1) * step])
    ] + bad[GOOD * step :]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    job = Job(
        sources=single_source(folder / "a.jsonl", root),
        tokenizer=str(GOLDEN / "tokenizer"),
        out=str(folder / "out"),
        capacity=1024,
        features_per_tile=4,
        tiling=Tiling(tile_size=16, max_tiles=4),
        max_rejects=1.0,
    )
    report = pack_dataset(job)
    assert (report.records, report.rejected) == (len(lines), len(bad))
    return folder, lines


def test_all_broken_records_are_listed_and_no_other(packed):
    folder, lines = packed
    rejects = [
        json.loads(line)
        for line in (folder / "out" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = [reject["line"] for reject in rejects]
    assert len(found) >= 300 and len(set(found)) == len(found)
    wanted = [
        number for number, line in enumerate(lines, start=1) if b'"value": "answer ' not in line
    ]
    assert sorted(found) == wanted
    assert all(reject["detail"] and reject["reason"] in REASONS for reject in rejects)
    assert all(len(reject["detail"]) < 12_000 for reject in rejects)


def test_only_good_records_reach_the_packs(packed):
    folder, lines = packed
    reader = Reader(folder / "out")
    packs = [reader.read(pack_id) for pack_id in range(reader.check())]
    stored = sorted(int(line) for pack in packs for line in pack.provenance["line"])
    assert (
        stored
        == [number for number, line in enumerate(lines, start=1) if b'"value": "answer ' in line]
        and len(stored) == GOOD
    )


def test_every_kind_of_damage_has_its_reason(packed):
    folder, _ = packed
    reasons = set(Reader(folder / "out").manifest.rejects)
    assert reasons >= {
        "malformed_json", "conversation", "role_order", "empty_answer", "image_field",
        "video_field", "video", "outside_root",
        "placeholder_count", "image_token_in_text", "missing_image", "unreadable_image",
        "missing_video", "unreadable_video", "too_long",
    }  # fmt: skip
