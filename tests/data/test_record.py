"""Annotation files and meta files, good and bad."""

from __future__ import annotations

import json

import pytest

from megavlm.data.record import Turn, count_records, parse_record, read_lines, read_meta, read_sources, single_file
from megavlm.data.reject import REASONS, RejectError

CHAT = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "this"}]


def _parse(**fields):
    return parse_record(json.dumps({"conversations": CHAT, **fields}).encode(), source=3, line=7, root="pictures")


def test_a_record_without_images():
    record = _parse(id=5, width=3)
    assert record.conversations == (Turn(role="human", text="what"), Turn(role="gpt", text="this"))
    assert (record.images, record.source, record.line) == ((), 3, 7)
    assert _parse(image="").images == _parse(image=None).images == _parse(image=[]).images == ()


def test_one_image_is_shown_first_where_the_text_does_not_say():
    record = _parse(image="a/b.jpg")
    assert record.images == ("pictures/a/b.jpg",)
    assert record.conversations[0].text == "<image>\nwhat"
    system = [{"from": "system", "value": "be brief"}, *CHAT]
    assert [turn.text for turn in _parse(image=["b.jpg"], conversations=system).conversations] == ["be brief", "<image>\nwhat", "this"]


def test_placeholders_that_are_there_stay():
    later = [*CHAT, {"from": "human", "value": "and <image>"}, {"from": "gpt", "value": "that"}]
    assert [turn.text for turn in _parse(image="b.jpg", conversations=later).conversations] == ["what", "this", "and <image>", "that"]
    assert _parse(image=["b.jpg", "/c.jpg"]).images == ("pictures/b.jpg", "/c.jpg")
    assert _parse(image=["b.jpg", "c.jpg"]).conversations[0].text == "what"


HUMAN, GPT, SYSTEM = ({"from": role, "value": "a"} for role in ("human", "gpt", "system"))
BAD_LINES = [
    (b'{"conversations": [', "malformed_json", "line 1 column"),
    (b"\xff\xfe", "malformed_json", "utf-8|decode"),
    (b"[1]", "malformed_json", "list, not an object"),
    ({}, "conversation", "missing"),
    ({"conversations": []}, "conversation", r"\[\]"),
    ({"conversations": "hello"}, "conversation", "hello"),
    ({"conversations": [HUMAN, {"from": "gpt"}]}, "conversation", r"conversations\[1\]"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "conversation", r"conversations\[1\]"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}]}, "conversation", "surrogate"),
    ({"conversations": [GPT, HUMAN]}, "role_order", "gpt, human"),
    ({"conversations": [HUMAN]}, "role_order", "the turns are human"),
    ({"conversations": [SYSTEM]}, "role_order", "system"),
    ({"conversations": [HUMAN, GPT, SYSTEM, HUMAN, GPT]}, "role_order", "system"),
    ({"conversations": [{"from": "user", "value": "a"}, GPT]}, "role_order", "user"),
    ({"conversations": CHAT, "image": 5}, "image_field", "5"),
    ({"conversations": CHAT, "image": ["a.jpg", None]}, "image_field", "None"),
    ({"conversations": CHAT, "video": "a.mp4"}, "video", "a.mp4"),
]


@pytest.mark.parametrize(("line", "reason", "words"), BAD_LINES)
def test_bad_lines(line, reason, words):
    text = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(RejectError, match=words) as caught:
        parse_record(text, source=0, line=1)
    assert caught.value.reason == reason
    assert reason in REASONS


def test_lines_are_read_from_any_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\ntwo two\n  \nend")
    lines = list(read_lines(path))
    assert lines == [(0, b"one\n"), (4, b"\n"), (5, b"two two\n"), (13, b"  \n"), (16, b"end")]
    assert list(read_lines(path, 5, 2)) == lines[2:4]
    assert count_records(path) == 3


def _meta(tmp_path, **entry):
    (tmp_path / "a.jsonl").touch()
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"first": {"root": "pictures", "annotation": str(tmp_path / "a.jsonl"), **entry}}))
    return path


def test_meta(tmp_path):
    path = _meta(tmp_path, data_augment=False, repeat_time=3, length=100, max_dynamic_patch=6)
    (source,) = read_meta(path)
    assert (source.name, source.root, source.path) == ("first", "pictures", str(tmp_path / "a.jsonl"))
    assert (source.repeat_time, source.repeats, source.max_tiles) == (3, 3, 6)
    (source,) = read_meta(_meta(tmp_path, repeat_time=0.25))
    assert (source.repeat_time, source.repeats, source.max_tiles) == (0.25, 1, None)


BAD_ENTRIES = [
    ({"repeat": 2, "roots": ""}, "unknown key 'repeat', 'roots'; known: root, annotation"),
    ({"data_augment": True}, "data_augment True is not supported yet; set it to false"),
    ({"repeat_time": 0}, "repeat_time 0 "),
    ({"repeat_time": 2.5}, "repeat_time 2.5 "),
    ({"repeat_time": True}, "repeat_time True "),
    ({"repeat_time": "2"}, "repeat_time '2' "),
    ({"repeat_time": float("inf")}, "repeat_time inf "),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch 0 "),
    ({"annotation": None}, "must be paths, not None"),
    ({"root": "s3://bucket"}, "s3://bucket: object storage is not supported"),
]


@pytest.mark.parametrize(("entry", "words"), BAD_ENTRIES)
def test_bad_meta_entries(tmp_path, entry, words):
    with pytest.raises(ValueError, match="--meta .*meta.json: 'first': ") as caught:
        read_meta(_meta(tmp_path, **entry))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": {}, "a": {}}', '{"a": 3}'])
def test_bad_meta_files(tmp_path, text):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="--meta .*meta.json"):
        read_meta(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--meta .*nowhere.json"):
        read_meta(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="'first': annotation .*nowhere.jsonl"):
        read_meta(_meta(tmp_path, annotation=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(FileNotFoundError, match="--jsonl .*nowhere.jsonl"):
        single_file(tmp_path / "nowhere.jsonl")


def test_sources_are_one_file_or_a_meta_file(tmp_path):
    path = _meta(tmp_path)
    assert read_sources(str(path), None) == read_meta(path)
    assert read_sources(None, str(tmp_path / "a.jsonl"), "here") == (single_file(tmp_path / "a.jsonl", "here"),)
    with pytest.raises(ValueError, match="--root here: goes with --jsonl"):
        read_sources(str(path), None, "here")
