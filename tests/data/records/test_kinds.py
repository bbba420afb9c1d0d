"""All kinds of samples, from all kinds of files, through the packer and back: what a batch decodes
is what the files show.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_meta
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.images.test_video import level, write_animation, write_folder, write_video
from tests.data.records.test_readers import tar

GOLDEN = Path(__file__).parents[2] / "golden"


SCORE = {"score": "clip", "min_score": 0.15}


def picture(brightness: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (brightness,) * 3).save(file, "PNG")
    return file.getvalue()


def write_sources(folder: Path) -> Path:
    """Write a source of each format, and the meta file that lists them."""
    for place in range(4):
        (folder / f"{place}.png").write_bytes(picture(50 * place))
    write_video(folder / "a.mp4", 30)
    write_animation(folder / "a.gif", 30)
    write_folder(folder / "frames", 30)
    chat = [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "two"}]
    ask = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a film"}]
    films = [{"video": name, "conversations": ask} for name in ("a.mp4", "a.gif", "frames")]
    lines = [
        {"image": ["1.png", "2.png"], "conversations": chat},
        {"text": "see <image> and read", "image": "3.png"},
        {"text": "read"},
        *films,
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "llava.json").write_text(
        json.dumps(
            [
                {"image": f"{place}.png", "caption": f"number {place}", "clip": place / 10}
                for place in range(4)
            ]
        )
    )
    tar(folder / "w-0.tar", {"a.png": picture(70), "a.txt": b"seventy"})
    tar(
        folder / "w-1.tar",
        {"b.png": picture(80), "b.json": json.dumps({"caption": "eighty"}).encode()},
    )
    rows = [
        {"image": {"bytes": picture(value), "path": None}, "caption": str(value)}
        for value in (90, 100, 110)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    meta = {
        "lines": {"root": str(folder), "annotation": str(folder / "a.jsonl")},
        "list": {"root": str(folder), "annotation": str(folder / "llava.json"),
                 "prompt": "Name it.", "filter": SCORE},
        "archives": {"annotation": str(folder / "w-{0..1}.tar"), "data_augment": True},
        "table": {"annotation": str(folder / "a.parquet"), "repeat_time": 2},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("kinds"))


def pack(meta: Path, out: Path, **settings) -> PackedDataset:
    job = Job(
        sources=read_meta(meta),
        tokenizer=str(GOLDEN / "tokenizer"),
        out=str(out),
        capacity=512,
        features_per_tile=4,
        tiling=Tiling(tile_size=16, max_tiles=4),
        frames=FrameChoice(min_frames=4, max_frames=8, sampling="middle"),
        **settings,
    )
    report = pack_dataset(job)
    assert (report.records, report.rejects) == (6 + 4 + 2 + 3, {"filtered_score": 2})
    assert report.samples == 6 + 2 + 2 + 3 * 2
    return PackedDataset(out)


def test_all_kinds_from_all_formats(meta, tmp_path):
    dataset = pack(meta, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    seen = {}
    for pack_id in range(len(dataset)):
        batch = dataset.batch(pack_id, 0)
        stored = dataset.reader.read(pack_id)
        first_tile = np.concatenate([[0], np.cumsum(stored.images["tiles"])])
        start = 0
        for sample, length in enumerate(stored.lengths.tolist()):
            own = np.flatnonzero(stored.images["sample"] == sample)
            tiles = [
                batch.tiles[first_tile[image] : first_tile[image + 1]].float().mean().item()
                for image in own
            ]
            learned = tokenizer.decode(
                stored.tokens[start : start + length][stored.supervised[start : start + length]],
                skip_special_tokens=True,
            )
            seen.setdefault(learned, []).append(tiles)
            start += length
    # Bytes that this tokenizer does not know fall out, but these words it can spell.
    brightness = {text: [round(value) for value in tiles[0]] for text, tiles in seen.items()}
    assert brightness.pop("see  and read") == [150] and brightness.pop("read") == []
    assert brightness.pop("two") == [50, 100]
    films = seen.pop("a film")
    assert len(films) == 3 and brightness.pop("a film")
    for film in films:
        assert 4 <= len(film) <= 8 and film == sorted(film)
        middles = [
            level(int(place)) for place in (np.arange(len(film)) + 0.5) * 30 / len(film) - 0.5
        ]
        assert film == pytest.approx(middles, abs=8)
    assert brightness == {
        "number 2": [100],
        "number 3": [150],
        "seventy": [70],
        "eighty": [80],
        "90": [90],
        "100": [100],
        "110": [110],
    }
    assert all(len(seen[name]) == 2 for name in ("90", "100", "110"))
    names = [
        (source.name, source.records, source.samples, source.augment)
        for source in dataset.manifest.sources
    ]
    assert names == [
        ("lines", 6, 6, False),
        ("list", 4, 2, False),
        ("archives", 1, 1, True),
        ("archives", 1, 1, True),
        ("table", 3, 6, False),
    ]


def test_workers_make_the_same_packs(meta, tmp_path):
    pack(meta, tmp_path / "here")
    pack(meta, tmp_path / "two", workers=2)
    here, two = ((tmp_path / name / "packs-00000.bin").read_bytes() for name in ("here", "two"))
    assert here == two


@pytest.mark.parametrize("template", ["Hermes-2", "plain"])
def test_other_templates_are_packed(meta, tmp_path, template):
    tokenizer = tmp_path / "tokenizer"
    load_tokenizer(GOLDEN / "tokenizer").save_pretrained(tokenizer)
    dataset = pack(meta, tmp_path / "out", template=template)
    assert dataset.manifest.template == template and (
        "书生" in dataset.manifest.system_message
    ) == (template == "Hermes-2")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").chat_template
