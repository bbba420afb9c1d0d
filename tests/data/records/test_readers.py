"""Annotation files of all formats: every record is found, in blocks of any length and by its place,
and what is damaged is told.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from megavlm.data.records import json_reader, readers
from megavlm.data.records.energon import Dataset, expand_braces, map_fields
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import Reader
from megavlm.data.records.readers import OPEN_FILES, find_files, open_reader
from megavlm.data.records.reject import RejectError

CHAT = [
    {"from": "human", "value": 'what is } in ]" <image>'},
    {"from": "gpt", "value": 'this \\ "[{" 你好'},
]
RECORDS = [{"id": place, "conversations": CHAT, "image": f"{place}.jpg"} for place in range(7)]


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write(folder: Path, kind: str) -> Path:
    """Write RECORDS to a file of some kind."""
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(
            "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
            encoding="utf-8",
        )
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=3)
    else:
        tar(
            path,
            {
                f"x/{place:03d}.{end}": data
                for place, record in enumerate(RECORDS)
                for end, data in (
                    ("jpg", b"pixels %d" % place),
                    ("json", json.dumps({"conversations": CHAT, "id": place}).encode()),
                )
            },
        )
    return path


def all_entries(entries: Reader, length: int):
    blocks = list(entries.ranges(length))
    assert all(0 < block.records <= length for block in blocks)
    return [
        entry
        for block in blocks
        for entry in entries.read(block.offset, block.number, block.records)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_every_record_is_found(tmp_path, kind, length):
    entries = open_reader(str(write(tmp_path, kind)))
    found = all_entries(entries, length)
    assert [entry.fields()["id"] for entry in found] == list(range(7))
    assert all(entry.fields()["conversations"] == CHAT for entry in found)
    assert [entry.number for entry in found] == (
        [1, 3, 5, 7, 9, 11, 13] if kind == "jsonl" else list(range(1, 8))
    )
    for entry in reversed(found):
        (again,) = entries.read(entry.offset, entry.number, 1)
        assert again == entry
    assert list(entries.read(found[-1].offset, 7, 5)) == found[-1:] if kind != "jsonl" else True


def test_a_record_of_an_archive_has_its_files(tmp_path):
    for place, entry in enumerate(all_entries(open_reader(str(write(tmp_path, "tar"))), 4)):
        (image,) = parse_record(entry.fields(), files=entry.files).images
        assert image.content == b"pixels %d" % place


def test_archives_without_json(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        {
            "1.png": b"p",
            "1.txt": b" a fox\n",
            "2.txt": b"text",
            "3.mp4": b"v",
            "3.json": b'{"caption": "film"}',
        },
    )
    fox, text, film = all_entries(open_reader(str(path)), 2)
    assert (fox.fields()["caption"], text.fields()["text"]) == ("a fox", "text")
    assert parse_record(film.fields(), files=film.files).videos[0].file.content == b"v"


def test_damage_in_an_archive_is_one_record_s(tmp_path):
    files = {
        "1.txt": b"one",
        "2.json": b"{",
        "3.txt": b"\xff",
        "4.jpg": b"x" * 2000,
        "4.txt": b"four",
    }
    path = tar(tmp_path / "a.tar", files)
    _, second, third, _ = all_entries(open_reader(str(path)), 9)
    for entry, words in ((second, "Expecting"), (third, "not UTF-8")):
        with pytest.raises(RejectError, match=words):
            entry.fields()
    (tmp_path / "no.tar").write_text("no archive" * 100)
    with pytest.raises(ValueError, match=r"no.tar: not an uncompressed tar archive"):
        list(open_reader(str(tmp_path / "no.tar")).ranges(1))


def test_damage_in_a_list_is_one_record_s(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}, {"id": 2,}, 5, null, "text", {"id": 3, "id": 4}, {"id": 3}]')
    found = all_entries(open_reader(str(path)), 2)
    assert [entry.number for entry in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry.fields()["id"] for entry in (found[0], found[6])] == [1, 3]
    for entry in found[1:6]:
        with pytest.raises(RejectError) as caught:
            entry.fields()
        assert caught.value.reason == "malformed_json"
    assert found[1].where() == "record 2 at byte 12"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_huge_record_is_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(json_reader, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / f"a.{kind}"
    lines = [json.dumps({"id": 1}), json.dumps({"id": "x" * 5000}), json.dumps({"id": 3})]
    path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    first, second, third = all_entries(open_reader(str(path)), 1)
    assert (first.fields(), third.fields()) == ({"id": 1}, {"id": 3})
    with pytest.raises(RejectError, match="longer than 1000 bytes"):
        second.fields()


def test_parquet_holds_images_and_conversations_as_text(tmp_path):
    rows = [
        {"conversations": json.dumps(CHAT), "image": {"bytes": b"1", "path": "x.jpg"}},
        {"conversations": "{", "image": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    good, bad = all_entries(open_reader(str(tmp_path / "a.parquet")), 9)
    assert parse_record(good.fields()).images[0].content == b"1"
    with pytest.raises(RejectError, match="conversations is '{'"):
        parse_record(bad.fields())
    (tmp_path / "no.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"no.parquet: not a parquet file that can be read"):
        open_reader(str(tmp_path / "no.parquet"))


def energon(
    folder: Path, kind: str, field_map: dict[str, str] | None, files: dict[str, bytes]
) -> Path:
    (folder / ".nv-meta").mkdir(parents=True)
    tar(folder / "shard_0.tar", files)
    tar(folder / "shard_1.tar", files)
    split = {"split_parts": {"train": ["shard_{0..0}.tar"], "val": ["shard_1.tar"]}, "exclude": []}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    sample = {
        "sample_type": {"__module__": "megatron.energon", "__class__": kind},
        "field_map": field_map,
    }
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(sample))
    return folder


QUESTION = b'{"q": "what", "a": ["fox"]}'
ENERGON = [
    ("CaptioningSample", {"image": "jpg;png", "caption": "txt"}, 
     {"1.png": b"p", "1.txt": b"a fox"}, "a fox"),
    ("VQASample", {"image": "jpg", "context": "json[q]", "answers": "json[a][0]"}, 
     {"1.jpg": b"p", "1.json": QUESTION}, "fox"),
    ("TextSample", {"text": "json[0][value]"}, {"1.json": b'[{"value": "a fox"}]'}, "a fox"),
    ("CrudeWebdataset", None, {"1.jpg": b"p", "1.txt": b"a fox"}, "a fox"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field_map", "files", "learned"), ENERGON)
def test_energon_datasets_are_read_without_energon(tmp_path, kind, field_map, files, learned):
    folder = energon(tmp_path / "data", kind, field_map, files)
    assert find_files(str(folder)) == [str(folder / "shard_0.tar")]
    (entry,) = all_entries(open_reader(str(folder / "shard_0.tar")), 9)
    record = parse_record(entry.fields(), files=entry.files)
    assert record.conversations[-1].text == learned
    assert [image.content for image in record.images] == ([] if kind == "TextSample" else [b"p"])


def test_energon_records_that_lack_a_file_and_other_kinds(tmp_path):
    with pytest.raises(RejectError, match=r"no file jpg; it has txt"):
        map_fields(
            Dataset(
                folder=tmp_path,
                shards=(),
                kind="CaptioningSample",
                fields={"image": "jpg", "caption": "txt"},
            ),
            {"txt": b"a"},
        )
    with pytest.raises(RejectError, match=r"json\[a\]: there is no 'a'"):
        text = Dataset(folder=tmp_path, shards=(), kind="TextSample", fields={"text": "json[a]"})
        map_fields(text, {"json": b"{}"})
    folder = energon(tmp_path / "data", "MultiMixQASample", {"x": "y"}, {"1.txt": b"a"})
    with pytest.raises(ValueError, match="samples of kind MultiMixQASample are not supported"):
        find_files(str(folder))


def test_names_of_files(tmp_path):
    assert expand_braces("a-{8..10}-{0..1}.tar") == [
        f"a-{place}-{part}.tar" for place in (8, 9, 10) for part in (0, 1)
    ]
    assert expand_braces("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match="no record can be read by its offset"):
        find_files(str(tmp_path / "a.tar.gz"))
    with pytest.raises(ValueError, match="a folder without .nv-meta"):
        find_files(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl: a pipe or a device"):
        find_files(str(tmp_path / "pipe.jsonl"))
    name = os.fsdecode(b"caf\xe9.json")
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"caf\\udce9.json: a name that is not UTF-8"):
        find_files(str(tmp_path / "*.json"))


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": CHAT, "ocr": [{"text": "STOP"}]},
        {"messages": [{"role": "user", "content": "q", "image": None}]},
    ],
)
def test_a_record_with_a_list_of_its_own_is_a_record(tmp_path, record):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(record)}\n" * 2)
    assert [raw.fields() for raw in all_entries(open_reader(str(path)), 100)] == [record] * 2


@pytest.mark.parametrize("text", ['[{"from": "human", "from": "gpt"}]', "[NaN]", "[" * 100_000])
def test_json_in_a_text_of_parquet_keeps_the_rules(tmp_path, text):
    pyarrow.parquet.write_table(pyarrow.table({"conversations": [text]}), tmp_path / "a.parquet")
    [raw] = all_entries(open_reader(str(tmp_path / "a.parquet")), 100)
    with pytest.raises(RejectError, match="conversations"):
        raw.fields()


def test_files_are_looked_into_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        readers,
        "FORMATS",
        tuple(
            replace(row, open=lambda path, row=row: opened.append(path) or row.open(path))
            for row in readers.FORMATS
        ),
    )
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(OPEN_FILES + 1)]
    for path in paths:
        Path(path).write_text(json.dumps(RECORDS[0]))
    tables = [str(tmp_path / f"{number}.parquet") for number in range(OPEN_FILES + 1)]
    for path in tables:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    for path in (*paths, *tables, paths[0], tables[0]):
        assert next(open_reader(path).read(0, 1, 1)).number == 1
    # Tables stay open, and a process may have few files open.
    assert opened == [*paths, *tables, tables[0]]
