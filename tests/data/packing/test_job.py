"""The whole offline job on generated images: what is packed is what the records say, and bad input
is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.packing.media import Images
from megavlm.data.packing.plan import plan_packs
from megavlm.data.records.meta_file import Annotations, single_source
from megavlm.data.records.readers import open_reader
from megavlm.data.store.reader import Reader
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
TILING = Tiling(tile_size=16, max_tiles=4)


def _chat(rng: random.Random, images: int) -> list[dict[str, str]]:
    question = "<image>\n" * images + "what number reads the sign " * rng.randint(1, 9)
    return [
        {"from": "human", "value": question},
        {"from": "gpt", "value": "the answer is five " * rng.randint(1, 20)},
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Make a folder with 12 images, ``good.jsonl`` of 90 records and ``bad.jsonl`` of 10, six of
    which cannot be used.
    """
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for place in range(12):
        pixels = np.random.default_rng(place).integers(
            0, 256, (rng.randint(10, 90), rng.randint(10, 90), 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{place}.{('png', 'jpg')[place % 2]}")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:-500])
    names = sorted(path.name for path in folder.iterdir() if path.stem.isdigit())
    lines = []
    for place in range(90):
        images = (0, 1, 2)[place % 3]
        lines.append(
            json.dumps(
                {
                    "id": place,
                    "image": rng.sample(names, images),
                    "conversations": _chat(rng, images),
                }
            )
        )
    (folder / "good.jsonl").write_text(
        "\n".join(lines[:40]) + "\n\n" + "\n".join(lines[40:]) + "\n"
    )
    bad = ['{"conversations": [', json.dumps({"conversations": []})]
    bad += [
        json.dumps({"image": image, "conversations": _chat(rng, 1)})
        for image in ("nowhere.png", "cut.png", names[:2])
    ]
    bad.append(
        json.dumps(
            {
                "conversations": [
                    {"from": "human", "value": "what " * 3000},
                    {"from": "gpt", "value": "a"},
                ]
            }
        )
    )
    (folder / "bad.jsonl").write_text("\n".join(bad + lines[:4]))
    return folder


def _job(data: Path, out: Path, name: str = "good", **settings) -> Job:
    defaults = {
        "tokenizer": str(GOLDEN / "tokenizer"),
        "capacity": 1024,
        "features_per_tile": 4,
        "tiling": TILING,
    }
    sources = single_source(data / f"{name}.jsonl", data)
    return Job(**{"sources": sources, "out": str(out), **defaults, **settings})


def _stored(folder: Path) -> list[tuple]:
    """(source, line, tokens, mask, images) of all samples of a dataset, in the order of the
    packs.
    """
    reader = Reader(folder)
    samples = []
    for pack in map(reader.read, range(len(reader))):
        ends = np.cumsum(pack.lengths)
        for place, (line, source, _) in enumerate(pack.provenance.tolist()):
            part = slice(ends[place] - pack.lengths[place], ends[place])
            images = tuple(
                pack.image(number) for number in np.flatnonzero(pack.images["sample"] == place)
            )
            samples.append(
                (source, line, pack.tokens[part].tobytes(), pack.supervised[part].tobytes(), images)
            )
    return samples


def test_packs_hold_every_record(data, tmp_path):
    report = pack_dataset(_job(data, tmp_path / "out"))
    encoder = Encoder(ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), 4), TILING, 1024)
    wanted = []
    (source,) = single_source(data / "good.jsonl", data)
    for entry in open_reader(source.path).read(0, 1, 1000):
        (sample,) = encoder.encode_raw(entry, source, source=0, images=Images.LOAD)
        images = tuple(image.encoded for image in sample.images)
        wanted.append(
            (0, entry.number, sample.tokens.tobytes(), sample.supervised.tobytes(), images)
        )
    assert sorted(_stored(tmp_path / "out")) == sorted(wanted)
    assert (report.records, report.samples, report.rejected, report.images) == (90, 90, 0, 90)
    assert report.fill > 0.8 and report.tiles_per_pack_max <= report.tile_cap
    assert report.tokens == sum(len(sample[2]) // 4 for sample in wanted)
    assert (
        json.loads(report.to_json())["packs"] == report.packs
        and f"{report.packs:,} of 1,024 tokens" in report.text()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # Nothing is left of what only a job that resumes needs.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "packs-00000.bin",
        "packs.idx",
        "rejects.jsonl",
        "report.json",
        "report.txt",
        "tokenizer",
    ]


def test_rejects_are_listed_with_file_and_line(data, tmp_path):
    pack_dataset(_job(data, tmp_path / "out", "bad", max_rejects=0.6))
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (1, "malformed_json"),
        (2, "conversation"),
        (3, "missing_image"),
        (5, "placeholder_count"),
        (6, "too_long"),
        (4, "unreadable_image"),  # seen when it is packed
    ]
    assert all(reject["file"] == str(data / "bad.jsonl") and reject["detail"] for reject in rejects)
    headers = pack_dataset(
        _job(data, tmp_path / "headers", "bad", max_rejects=0.6, decode_images=False)
    )
    assert "unreadable_image" not in headers.rejects


def _stop(*_, **__) -> None:
    raise KeyboardInterrupt


def test_too_many_rejects_stop_the_job(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="5 of 10 records") as caught:
        pack_dataset(_job(data, tmp_path / "out", "bad"))
    assert f"{data / 'bad.jsonl'}:1: malformed_json: " in str(caught.value)
    assert "--max_rejects 0.01 allows 1.00%" in str(caught.value) and str(
        tmp_path / "out.rejects.jsonl"
    ) in str(caught.value)
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megavlm.data.packing.job.complete", _stop)
        pack_dataset(_job(data, tmp_path / "out", "bad", max_rejects=0.6))
    with pytest.raises(ValueError, match="6 of 10 records"):  # though all shards are written
        pack_dataset(_job(data, tmp_path / "out", "bad", max_rejects=0.5))
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "out").exists()
    assert pack_dataset(_job(data, tmp_path / "out", "bad", max_rejects=0.6)).packed_records == 4


def test_the_result_depends_on_the_seed_alone(data, tmp_path):
    names = ("here", "two", "other")
    for name, settings in zip(names, ({}, {"workers": 2}, {"seed": 1}), strict=True):
        pack_dataset(_job(data, tmp_path / name, **settings))
    here, two, other = ((tmp_path / name / "packs-00000.bin").read_bytes() for name in names)
    assert here == two
    assert here != other
    assert sorted(_stored(tmp_path / "here")) == sorted(_stored(tmp_path / "other"))


def test_repeats_and_shares(data, tmp_path):
    good, bad = (
        Annotations(name=name, path=str(data / f"{name}.jsonl"), root=str(data))
        for name in ("good", "bad")
    )
    sources = (
        dataclasses.replace(good, repeat_time=0.5),
        dataclasses.replace(bad, repeat_time=3.0, max_tiles=1),
    )
    report = pack_dataset(_job(data, tmp_path / "out", sources=sources, max_rejects=0.2))
    assert (report.records, report.rejected, report.samples) == (45 + 10, 6, 45 + 3 * 4)
    counts = Counter(sample[:2] for sample in _stored(tmp_path / "out"))
    # line 41 is blank, so the first half of 90 records ends with line 46
    assert {line for source, line in counts if source == 0} == set(range(1, 47)) - {41}
    assert counts[1, 7] == counts[1, 10] == 3 and set(counts.values()) == {1, 3}
    totals = Reader(tmp_path / "out").manifest
    assert [(source.records, source.samples) for source in totals.sources] == [(45, 45), (10, 12)]


def test_a_record_that_changes_meanwhile_is_left_out(data, tmp_path, monkeypatch):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((data / "good.jsonl").read_bytes())

    def change(*arguments, **settings):
        lines = copy.read_text().splitlines(keepends=True)
        lines[-1] = lines[-1].replace("five", "six ")  # as long, but of other tokens
        copy.write_text("".join(lines))
        return plan_packs(*arguments, **settings)

    monkeypatch.setattr("megavlm.data.packing.job.plan_packs", change)
    report = pack_dataset(
        _job(data, tmp_path / "out", sources=single_source(copy, data), max_rejects=0.02)
    )
    assert (report.records, report.packed_records, report.rejects) == (90, 89, {"changed": 1})
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (reject["file"], reject["line"]) == (str(copy), 91) and "before: " in reject["detail"]
    assert 91 not in {sample[1] for sample in _stored(tmp_path / "out")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity": 0}, "--capacity 0"),
        (
            {"capacity": 1000, "alignment": 16},
            "--capacity 1000: must be a multiple of --alignment 16",
        ),
        ({"max_rejects": 2.0}, "--max_rejects 2.0"),
        ({"workers": -1}, "--workers -1"),
        ({"tile_cap": -1}, "--tile_cap -1"),
        ({"capacity": 2**31}, "--capacity 2147483648: must be at most 2147483647"),
        ({"capacity": 2**31 - 1, "tile_cap": 9}, r"up to 9 tiles \(--tile_cap\): a table of 77"),
        ({"tile_cap": 10**30}, r"up to 10{30} tiles \(--tile_cap\): a table of"),
        ({"tile_multiple": 2000}, "--tile_multiple 2000: must be at most 1024"),
        ({"features_per_tile": 10**9}, "--tokens_per_tile 1000000000: must be at most --capacity"),
    ],
)
def test_settings_that_cannot_be(data, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        pack_dataset(_job(data, tmp_path / "out", **settings))


def test_out_is_never_overwritten(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="--out .*out: already holds something"):
        pack_dataset(_job(data, tmp_path / "out"))
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="new.partial holds something else"):
        pack_dataset(_job(data, tmp_path / "new"))
    (tmp_path / "empty").mkdir()
    assert pack_dataset(_job(data, tmp_path / "empty")).packs == len(Reader(tmp_path / "empty"))


TOOL = Path(__file__).parents[3] / "tools" / "pack_dataset.py"


def _run_tool(data: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        TOOL,
        "--jsonl",
        data / "good.jsonl",
        "--root",
        data,
        "--tokenizer",
        GOLDEN / "tokenizer",
        "--workers",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(
        [*map(str, command), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tool_packs(data, tmp_path):
    out = tmp_path / "out"
    figures = tmp_path / "report.json"
    done = _run_tool(
        data, "--model", "tiny", "--out", str(out), "--capacity", "1500", "--json", str(figures)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "records   90 read, 0 rejected" in done.stdout
        and json.loads(figures.read_text())["samples"] == 90
    )
    manifest = Reader(out).manifest
    assert (
        manifest.image_size,
        manifest.features_per_tile,
        manifest.max_tiles,
        manifest.capacity,
    ) == (32, 16, 12, 1500)


def test_the_tool_tells_what_is_wrong_in_one_line(data, tmp_path):
    done = _run_tool(data, "--model", "tiny", "--out", str(data))
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"pack_dataset: error: --out {data}: already holds")
        and done.stderr.count("\n") == 1
    )


def test_a_dry_run_has_nothing_to_resume_from(data):
    done = _run_tool(data, "--dry_run", "--jsonl", str(data / "bad.jsonl"), "--model", "tiny")
    assert done.returncode == 2
    assert "Repair the records or their media, or give a larger --max_rejects." in done.stderr
    assert "nothing" not in done.stderr and "resumes" not in done.stderr
