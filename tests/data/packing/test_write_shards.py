"""The second pass leaves out what it cannot pack, once for each record, and ends when that is too
much.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.packing import job as packing
from megavlm.data.packing import write_shards
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.plan import plan_packs
from megavlm.data.packing.windows import Windows
from megavlm.data.packing.write_shards import (
    Documents,
    SourceTotals,
    WrittenShard,
    WrittenShards,
)
from megavlm.data.records.meta_file import single_source
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.sample import Image, Sample
from megavlm.data.store.manifest import Shard, Totals
from megavlm.data.store.reader import Reader
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.packing.test_repair import bytes_of, chat, job, save


def damaged(path: Path) -> None:
    """Save an image whose header is good and whose end is missing."""
    path.write_bytes(save(path)[:-30])


def rejected_lines(folder: Path) -> list[int]:
    return [json.loads(line)["line"] for line in (folder / "rejects.jsonl").open()]


def test_the_documents_used_last_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_shards, "DOCUMENT_BYTES", 1000)
    documents = Documents()

    def keep(offset: int, size: int) -> None:
        image = Image(encoded=bytes(size - 50), width=1, height=1, columns=1, rows=1, tiles=1)
        zeros = np.zeros(10, np.int32)
        sample = Sample(tokens=zeros, supervised=zeros > 0, images=(image,), source=0, line=1)
        documents.keep((0, offset), RawRecord(offset=offset, number=1, content=b""), (sample,))

    for offset, size, kept in (
        (1, 400, [1]),
        (2, 600, [1, 2]),
        (3, 100, [2, 3]),
        (4, 300, [2, 3, 4]),
        (5, 900, [5]),
        (6, 1001, []),
        (7, 1000, [7]),
    ):
        keep(offset, size)
        assert [offset for _, offset in documents] == kept


def test_what_shards_hold_of_sources_is_added_up_and_not_kept() -> None:
    shards = WrittenShards(3)
    for number in (1, 0):
        counts = dict(samples=5, text_only=1, tokens=70, tiles=8, images=6, deep_images=2)
        totals = SourceTotals(**{name: count + number for name, count in counts.items()})
        shard = Shard(name=f"packs-{number}", packs=1, bin_bytes=64)
        written = WrittenShard(
            shard=shard, totals=Totals(), rejects=(), sources={0: totals, 2 - number: totals}
        )
        shards.add(number, written)
    assert [(each.shard.name, each.sources) for each in shards] == [
        ("packs-0", {}),
        ("packs-1", {}),
    ]
    assert 0 in shards and 2 not in shards
    names = ("samples", "text_only", "tokens", "tiles", "images", "deep_images")
    found = [[vars(each)[name] for name in names] for each in shards.sources]
    assert found == [[11, 3, 141, 17, 13, 5], [6, 2, 71, 9, 7, 3], [5, 1, 70, 8, 6, 2]]


def test_a_document_with_a_damaged_image_is_left_out_whole(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    damaged(tmp_path / "bad.png")
    parts = {"texts": ["one " * 30, None, "two " * 30, None, "three " * 30]}
    lines = [
        json.dumps({**parts, "images": [None, "good.png", None, name, None]})
        for name in ("good.png", "bad.png", "good.png")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = {"windows": Windows(tokens=60, images=1), "capacity": 128}
    report = pack_dataset(job(tmp_path, max_rejects=0.34, **settings))
    assert (report.packed_records, report.rejected, report.samples > 6) == (2, 1, True)
    assert rejected_lines(tmp_path / "out") == [2]
    reader = Reader(tmp_path / "out")
    packed = {
        line for pack in map(reader.read, range(len(reader))) for line in pack.provenance["line"]
    }
    assert packed == {1, 3}
    save(tmp_path / "bad.png")
    pack_dataset(job(tmp_path, "whole", **settings))
    whole = Reader(tmp_path / "whole")
    lines = [
        line for pack in map(whole.read, range(len(whole))) for line in pack.provenance["line"]
    ]
    assert lines.count(1) == lines.count(2) == lines.count(3) == report.samples // 2


def test_documents_are_encoded_once_and_those_of_two_files_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode_raw
    encoded = []

    def counted(self, raw, annotations, **how):
        encoded.append(annotations.name)
        return encode(self, raw, annotations, **how)

    monkeypatch.setattr(Encoder, "encode_raw", counted)
    words = {"a": "one", "b": "two"}
    for name, word in words.items():
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"texts": [f"{word} " * 60], "images": [None]})
        )
    sources = [single_source(tmp_path / f"{name}.jsonl", tmp_path)[0] for name in words]
    pack_dataset(job(tmp_path, sources=tuple(sources), capacity=64, windows=Windows(tokens=20)))
    assert sorted(encoded) == ["a", "b"]
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    reader = Reader(tmp_path / "out")
    for pack in map(reader.read, range(len(reader))):
        samples = np.split(pack.tokens, np.cumsum(pack.lengths)[:-1])
        for source, tokens in zip(pack.provenance["source"], samples, strict=True):
            assert list(words.values())[source] in tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("line", "reason", "told"),
    [
        ("x" * 30, "changed", "a.jsonl:3: malformed_json: "),
        ("", "changed", "now: gone"),
        (chat(image="none.png"), "missing_image", "none.png"),
    ],
    ids=["damaged", "gone", "other"],
)
def test_a_record_that_is_no_sample_any_more_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str, told: str
) -> None:
    path = tmp_path / "a.jsonl"
    before = f"{chat()}\n{chat()}\n"
    path.write_text(before + chat())

    def plan(*samples, **settings):
        path.write_text(before + line)
        return plan_packs(*samples, **settings)

    monkeypatch.setattr(packing, "plan_packs", plan)
    report = pack_dataset(job(tmp_path, max_rejects=0.5))
    [reject] = [json.loads(one) for one in (tmp_path / "out" / "rejects.jsonl").open()]
    assert (report.packed_records, reject["line"]) == (2, 3)
    assert reject["reason"] == reason and told in reject["detail"]


def test_levels_lose_the_packs_of_which_no_sample_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 2)
    save(tmp_path / "good.png")
    damaged(tmp_path / "bad.png")
    images = ({"image": "good.png"}, {"image": "bad.png"}, {})
    lines = [chat(hard=hard, **image) for hard, image in enumerate(images) for _ in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (source,) = single_source(tmp_path / "a.jsonl", tmp_path)
    sources = (replace(source, difficulty="hard"),)
    report = pack_dataset(job(tmp_path, sources=sources, max_rejects=0.5))
    manifest = Reader(tmp_path / "out").manifest
    assert [(each.packs, each.easiest) for each in manifest.levels] == [(2, 0), (2, 2)]
    assert report.packs == 4 and rejected_lines(tmp_path / "out") == [5, 6, 7, 8]
    assert report.tiles == 4 and report.tiles_per_pack_mean == 1.0


@pytest.mark.parametrize("name", ["packs-00001.bin", "packs-00001.records"])
def test_a_shard_that_lacks_bytes_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    (tmp_path / "a.jsonl").write_text("\n".join([chat()] * 3))
    wanted = job(tmp_path, capacity=256)
    pack_dataset(replace(wanted, out=str(tmp_path / "whole")))
    for size in (None, 8):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(packing, "complete", lambda *_: 1 / 0)
            pack_dataset(wanted)
        path = tmp_path / "out.partial" / name
        if size is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:size])
        pack_dataset(wanted)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
        (tmp_path / "out").rename(tmp_path / f"done-{size}")


def test_the_limit_counts_each_record_once_over_both_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line 1 has no image, 3 has a damaged one; both are wanted three times."""
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    save(tmp_path / "good.png")
    damaged(tmp_path / "bad.png")
    names = ("none.png", "good.png", "bad.png", "good.png")
    (tmp_path / "a.jsonl").write_text("\n".join(chat(image=name) for name in names))
    (source,) = single_source(tmp_path / "a.jsonl", tmp_path)
    wanted = job(tmp_path, sources=(replace(source, repeat_time=3),), capacity=256)
    told = r"^2 of 4 records \(50.00%\).*The first:\n.*:1: missing_image.*\n.*:3: unread"
    with pytest.raises(ValueError, match=told):
        pack_dataset(replace(wanted, max_rejects=0.49))
    listed = [json.loads(line)["line"] for line in (tmp_path / "out.rejects.jsonl").open()]
    assert listed == [1, 3]
    report = pack_dataset(replace(wanted, max_rejects=0.5))
    assert (report.packed_records, report.rejected, report.samples) == (2, 2, 6)
    assert rejected_lines(tmp_path / "out") == [1, 3]


def test_a_packing_ends_as_soon_as_too_many_records_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    damaged(tmp_path / "bad.png")
    (tmp_path / "a.jsonl").write_text("\n".join([chat(image="bad.png")] * 8))
    with pytest.raises(ValueError, match=r"^3 of 8 records"):
        pack_dataset(job(tmp_path, capacity=256, max_rejects=0.25))
    assert len(list((tmp_path / "out.partial").glob("packs-*.bin"))) == 3
    with pytest.raises(ValueError, match=r"^8 of 8 .* and one must be left") as caught:
        pack_dataset(job(tmp_path, capacity=256, max_rejects=1.0))
    assert len(str(caught.value).splitlines()) == 6, "five of them are shown"


def test_the_manifest_tells_what_was_wanted(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "a.jsonl").write_text("\n".join([chat(image="0.png")] * 3))
    (source,) = single_source(tmp_path / "a.jsonl", tmp_path)
    sources = (replace(source, repeat_time=2, augment=True), replace(source, name="b"))
    pack_dataset(job(tmp_path, sources=sources, tile_multiple=7))
    manifest = Reader(tmp_path / "out").manifest
    told = [(each.repeat_time, each.augment, each.samples) for each in manifest.sources]
    assert manifest.tile_cap % 7 == 0 and sum(samples for *_, samples in told) == 9
    assert [each[:2] for each in told] == [(2, True), (1, False)]
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert manifest.vocab_size == max(tokenizer.get_vocab().values()) + 1


def test_a_share_of_which_no_record_is_left_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([chat()] * 3))
    (source,) = single_source(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"^no records in .*a.jsonl, of which repeat_time below 1"):
        pack_dataset(job(tmp_path, sources=(replace(source, repeat_time=0.3),)))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^no records in .*a.jsonl$"):
        pack_dataset(job(tmp_path, "empty", sources=single_source(tmp_path / "a.jsonl", tmp_path)))
