"""No record is lost in silence: whatever is done to a file, its readers count what an independent
count finds, or end with an error that names the file.

``MEGAVLM_DAMAGES`` sets the number of random damages of each run; 2000 for all.
"""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megavlm.data.records.meta_file import read_meta
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.readers import find_format, open_reader
from megavlm.data.records.reject import RejectError
from tests.data.records.test_readers import energon, tar

DAMAGES = int(os.environ.get("MEGAVLM_DAMAGES", "120"))
RECORDS = 40
INFO = b'"info": {"year": 2014, "url": "http://x"}, "licenses": [{"id": 1}], '
COCO = (
    b"{" + INFO + b'"images": [{"license": 5, "file_name": "a.jpg", "id": 9}],'
    b' "annotations": [{"image_id": 9, "id": 1, "caption": "one"}]}'
)
VQA = (
    b'{"info": {}, "task_type": "Open-Ended", "questions":'
    b' [{"image_id": 9, "question": "is it?", "question_id": 90}]}'
)
VQA_ANSWERS = (
    b"{" + INFO + b'"annotations": [{"question_type": "is", "multiple_choice_answer": "yes",'
    b' "answers": [{"answer": "yes", "answer_id": 1}], "image_id": 9, "question_id": 90}]}'
)


def read_all(path: Path) -> tuple[list[RawRecord], int]:
    """Read a file as the packer does, and count the records that parse."""
    reader = find_format(str(path)).open(str(path))
    found = []
    packed = 0
    for extent in reader.ranges(7):
        part = list(reader.read(extent.offset, extent.number, extent.records))
        assert len(part) == extent.records
        for raw in part:
            try:
                parse_record(raw.fields(), files=raw.files)
            except RejectError:
                continue
            packed += 1
        found += part
    return found, packed


def records(rng: random.Random) -> list[dict]:
    """Make records whose texts hold JSON's punctuation."""
    texts = ["{", "}", "[", "]", ",", ":", '"', "\\", "\n", "word", "12", "null", "ä"]
    return [
        {
            "id": index,
            "conversations": [
                {"from": "human", "value": f"q {''.join(rng.choices(texts, k=5))}"},
                {"from": "gpt", "value": f"a {''.join(rng.choices(texts, k=5))}"},
            ],
        }
        for index in range(RECORDS)
    ]


def write(folder: Path, kind: str, rng: random.Random) -> Path:
    """Write a whole file of ``RECORDS`` records."""
    chosen = records(rng)
    lines = [json.dumps(each, ensure_ascii=rng.random() < 0.5) for each in chosen]
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "json":
        indent = rng.choice([None, None, 1])
        rows = rng.random() < 0.5
        text = "[\n" + ",\n".join(lines) + "\n]\n" if rows else json.dumps(chosen, indent=indent)
        path.write_text(text, encoding="utf-8")
    elif kind == "tar":
        tar(path, {f"{index:04d}.json": line.encode() for index, line in enumerate(lines)})
    else:
        rows = [{**each, "id": str(each["id"])} for each in chosen]
        compression = rng.choice(["snappy", "none", "zstd"])
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=9, compression=compression
        )
    return path


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Bytes ``begin`` to ``end`` of a file became ``some``."""

    begin: int
    end: int
    some: bytes

    def of(self, data: bytes) -> bytes:
        return data[: self.begin] + self.some + data[self.end :]


def damage(data: bytes, rng: random.Random, kind: str) -> Damage:
    """Cut, change, drop, insert or double some bytes."""
    place = rng.randrange(len(data))
    signs = b'"{}[],:\\ \n0x' if kind.startswith("json") else bytes(range(256))
    some = bytes(rng.choices(signs, k=rng.choice([1, 1, 1, 2, 30])))
    behind = min(len(data), place + rng.choice([1, 1, 1, 7, 300]))
    size = len(data)
    changes = [
        Damage(begin=place, end=size, some=b""),
        Damage(begin=place, end=min(size, place + len(some)), some=some),
        Damage(begin=place, end=behind, some=b""),
        Damage(begin=place, end=place, some=some),
        Damage(begin=place, end=place, some=data[place:behind]),
        Damage(begin=size, end=size, some=data[: rng.choice([size, place])]),
    ]
    return rng.choice(changes)


def lines_of(data: bytes) -> int:
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def extents_of(whole: bytes) -> list[tuple[int, int]]:
    """Where the records of a whole file of JSON are, by Python's own parser."""
    text = whole.decode("latin-1")  # a character a byte
    decoder = json.JSONDecoder(strict=False)
    extents = []
    end = 0
    while (start := text.find("{", end)) >= 0:
        end = decoder.raw_decode(text, start)[1]
        extents.append((start, end))
    return extents


def check_json(whole: bytes, done: Damage, found: list[RawRecord]) -> None:
    """Check that each record which the damage did not touch was found as it was, and that what is
    left of those that it touched was not passed over.
    """
    extents = extents_of(whole)
    assert len(extents) == RECORDS
    ahead = [each for each in extents if each[1] <= done.begin]
    behind = [each for each in extents if each[0] >= done.end]
    rest = len(found) - len(ahead) - len(behind)
    assert rest >= 0, (rest, done)
    kept = found[: len(ahead)] + found[len(found) - len(behind) :]
    for raw, (start, end) in zip(kept, ahead + behind, strict=True):
        assert raw.fields() == json.loads(whole[start:end])
    remains = any(start < done.begin < end or start < done.end < end for start, end in extents)
    touched = RECORDS - len(ahead) - len(behind)
    # Text that was put in makes more records only with signs between them.
    most = touched + 1 + done.some.count(b",") + done.some.count(b"\n")
    assert int(remains) <= rest <= most, (rest, touched, done)


@pytest.mark.parametrize("kind", ["jsonl", "json", "tar", "parquet"])
def test_damaged_files_lose_no_record_in_silence(tmp_path: Path, kind: str):
    rng = random.Random(kind)
    outcomes = {"error": 0, "counted": 0}
    path = write(tmp_path, kind, rng)
    for number in range(-(-DAMAGES // 4)):
        if number % 25 == 0:
            path = write(tmp_path, kind, rng)
            whole = path.read_bytes()
            found, packed = read_all(path)
            assert len(found) == packed == RECORDS
        done = damage(whole, rng, kind)
        data = done.of(whole)
        path.write_bytes(data)
        try:
            found, packed = read_all(path)
        except ValueError as error:
            assert str(path) in str(error), error
            outcomes["error"] += 1
            continue
        outcomes["counted"] += 1
        if kind == "jsonl":
            assert len(found) == lines_of(data), number
        elif kind == "json":
            check_json(whole, done, found)
        else:
            assert len(found) == RECORDS, (number, packed)
        assert packed <= len(found)
    assert outcomes["counted"] and (outcomes["error"] or kind == "jsonl"), outcomes


LISTS = [
    ('[{"text": "a"}, {"text": "b"}', "list is not closed"),
    ('[{"text": "a"}, {"text": "b"}]]', "something follows the end of the list at byte 29"),
    ('[{"text": "a"}]\n[{"text": "b"}]', "something follows the end of the list"),
    ('[{"text": "a"}} , {"text": "b"}]', "byte 14, before record 2: '}' is not expected"),
    ('[{"text": "a"} {"text": "b"}]', "record 2 at byte 15: no comma"),
    ('[{"text": "a"},, {"text": "b"}]', "byte 15, before record 2"),
    ('[{"text": "a"}, {"text": "b"},]', "before record 3"),
    ('[{"text": "a"}, {"text": "b"], {"text": "c"}]', "list is not closed: record 2"),
    ('[{"text": "a"}, {"text": "he said "hi" there"}, {"text": "c"}]', "record 2 at byte 16"),
    ('[{"text": "a"}, word, {"text": "b"}]', "byte 16, before record 2: 'word'"),
]


@pytest.mark.parametrize(("text", "words"), LISTS)
def test_a_damaged_list_is_refused_with_byte_and_record(tmp_path: Path, text: str, words: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_all(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def parts() -> dict[str, bytes]:
    return {f"{index}.txt": b"text %d" % index for index in range(4)}


def header_behind(data: bytes) -> bytes:
    return data[:1024] + b"\xff" + data[1025:]


ARCHIVES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:2048], "the archive has no end"),
    (lambda data: data[:2060], "the archive has no end"),
    (lambda data: data[:1600], "cut off or damaged"),
    (header_behind, "a damaged header at byte 1024, behind 0.txt"),
    (lambda data: data + data, "behind the end of the archive; archives are joined with tar"),
]


@pytest.mark.parametrize(("change", "words"), ARCHIVES)
def test_a_damaged_archive_is_refused(tmp_path: Path, change: Callable, words: str):
    path = tar(tmp_path / "a.tar", parts())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        read_all(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_files_of_one_name_do_not_replace_each_other(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("1.json", "1.json", "2.0.txt", "2.1.txt", "3.JPG", "3.txt"):
            member = tarfile.TarInfo(name)
            data = json.dumps({"text": name}).encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("4.jpg")
        link.type = tarfile.LNKTYPE
        link.linkname = "3.JPG"
        archive.addfile(link)
    found, packed = read_all(path)
    assert (len(found), packed) == (5, 3)
    with pytest.raises(RejectError, match=r"2.0.txt, 2.1.txt; names agree up to the first dot"):
        found[2].fields()
    with pytest.raises(RejectError, match=r"4.jpg is a link"):
        found[4].fields()


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    found, packed = read_all(path)
    assert (len(found), packed) == (2, 1)
    with pytest.raises(RejectError, match="the key 'text' is there twice"):
        found[0].fields()


def test_energon_counts_and_exclusions(tmp_path: Path):
    files = {f"{index:04d}.txt": b"text" for index in range(4)}
    folder = energon(tmp_path / "one", "TextSample", {"text": "md,txt"}, files)
    (folder / ".nv-meta" / "split.yaml").write_text(
        "split_parts: {train: ['shard_{0,1}.tar']}\n"
        "exclude: [shard_1.tar, 'shard_0.tar/000{1..2}']\n"
    )
    found, packed = read_all(folder / "shard_0.tar")
    assert [raw.location for raw in found] == ["record 1, 0000", "record 2, 0003"]
    assert packed == 2
    other = energon(tmp_path / "two", "TextSample", {"text": "txt"}, files)
    (other / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"shard_0.tar": 5}}')
    with pytest.raises(ValueError, match=r"4 records, but .nv-meta/.info counts 5"):
        read_all(other / "shard_0.tar")


def test_files_that_are_something_else_are_named(tmp_path: Path):
    cases = [
        ("a.jsonl", b"\x1f\x8b\x08rest", "gzip data"),
        ("b.json", b'{"data": [{"text": "a"}]}', "jq -c '.data[]'"),
        ("coco.json", COCO, "docs/formats.md"),
        ("vqa.json", VQA, "docs/formats.md"),
        ("vqa_answers.json", VQA_ANSWERS, "docs/formats.md"),
        (
            "cut.json",
            COCO.replace(b'"annotations"', b" " * 2**20 + b'"annotations"'),
            "docs/formats",
        ),
        ("c.jsonl", b'{\n "text": "a"\n}\n', "objects that span several lines"),
        ("d.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("e.csv", b"a,b\n", "no format has this ending; the endings are .jsonl"),
        ("f.JSONL.GZ", b"\x1f\x8b", "unpack it first: gunzip"),
        ("g.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "a carriage return alone: tr"),
    ]
    for name, data, words in cases:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            open_reader(str(path))
        assert words in str(caught.value) and str(path) in str(caught.value)
    for name in ("A.JSON", "b.JsonL"):
        (tmp_path / name).write_text('[{"text": "a"}]')
        assert len(read_all(tmp_path / name)[0]) == 1


def test_the_length_of_a_meta_file_is_a_number(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": {"annotation": str(tmp_path / "a.jsonl"), "length": 1}}))
    assert read_meta(meta)[0].length == 1
    meta.write_text(json.dumps({"a": {"annotation": str(tmp_path / "a.jsonl"), "length": "1"}}))
    with pytest.raises(ValueError, match="length '1' must be a number of records"):
        read_meta(meta)
