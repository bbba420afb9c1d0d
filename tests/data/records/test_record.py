"""Records, good and bad."""

from __future__ import annotations

import json
import os

import pytest

from megavlm.data.records.parse import parse_record
from megavlm.data.records.record import MediaFile, Turn, Video, parse_json
from megavlm.data.records.reject import REASONS, RejectError

CHAT = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "this"}]


def _parse(**fields):
    return parse_record(
        parse_json(json.dumps({"conversations": CHAT, **fields}).encode()), root="pictures"
    )


def _paths(**fields):
    return [file.path for file in _parse(**fields).images]


def test_a_record_without_images():
    record = _parse(id=5, width=3)
    assert record.conversations == (Turn(role="human", text="what"), Turn(role="gpt", text="this"))
    assert (record.images, record.videos, record.unread) == ((), (), ("id", "width"))
    assert _parse(image="").images == _parse(image=None).images == _parse(image=[]).images == ()


def test_one_image_is_shown_first_where_the_text_does_not_say():
    record = _parse(image="a/b.jpg")
    assert record.images == (MediaFile(path="pictures/a/b.jpg"),)
    assert record.conversations[0].text == "<image>\nwhat"
    system = [{"from": "system", "value": "be brief"}, *CHAT]
    assert [turn.text for turn in _parse(image=["b.jpg"], conversations=system).conversations] == [
        "be brief",
        "<image>\nwhat",
        "this",
    ]


def test_placeholders_that_are_there_stay():
    later = [*CHAT, {"from": "human", "value": "and <image>"}, {"from": "gpt", "value": "that"}]
    assert [turn.text for turn in _parse(image="b.jpg", conversations=later).conversations] == [
        "what",
        "this",
        "and <image>",
        "that",
    ]
    assert _paths(image=["b.jpg", os.path.abspath("pictures/c.jpg")]) == [
        "pictures/b.jpg",
        os.path.abspath("pictures/c.jpg"),
    ]
    assert _parse(image=["b.jpg", "c.jpg"]).conversations[0].text == "what"


HUMAN, GPT, SYSTEM = ({"from": role, "value": "a"} for role in ("human", "gpt", "system"))
BAD_LINES = [
    (b'{"conversations": [', "malformed_json", "line 1 column"),
    (b"\xff\xfe", "malformed_json", "utf-8|decode"),
    (b"[1]", "malformed_json", "list, not an object"),
    ({}, "conversation", "none of conversations, messages,"),
    ({"conversations": []}, "conversation", r"\[\]"),
    ({"conversations": "hello"}, "conversation", "hello"),
    ({"conversations": [HUMAN, {"from": "gpt"}]}, "conversation", r"conversations\[1\]"),
    (
        {"conversations": [HUMAN, {"from": "gpt", "value": 3}]},
        "conversation",
        r"conversations\[1\]",
    ),
    ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}]}, "conversation", "surrogate"),
    ({"conversations": [GPT, HUMAN]}, "role_order", "gpt, human"),
    ({"conversations": [HUMAN]}, "role_order", "the turns are human"),
    ({"conversations": [SYSTEM]}, "role_order", "system"),
    ({"conversations": [HUMAN, GPT, SYSTEM, HUMAN, GPT]}, "role_order", "system"),
    ({"conversations": [{"from": "tool", "value": "a"}, GPT]}, "role_order", "tool"),
    ({"conversations": CHAT, "image": 5}, "image_field", "5"),
    ({"conversations": CHAT, "image": ["a.jpg", None]}, "image_field", "None"),
    ({"conversations": CHAT, "video": ["a.mp4", "b.mp4"]}, "placeholder_count", "2 videos"),
    (
        {"conversations": CHAT, "video": "a.mp4", "image": "a.jpg"},
        "placeholder_count",
        "0 <video> placeholders, but 1",
    ),
    ({"conversations": CHAT, "video": 5}, "video_field", "5"),
    ({"conversations": CHAT, "video": "a.mp4", "clip": [3, 2]}, "video", r"clip \[3, 2\]"),
    ({"conversations": CHAT, "video": "a.mp4", "clip": ["0", "2"]}, "video", "clip"),
    (b'{"conversations": [], "width": NaN}', "malformed_json", "NaN is not JSON"),
    (b'{"id": ' + b"1" * 5000 + b"}", "malformed_json", "integer string"),
    (b"[" * 100_000, "malformed_json", "recursion|Recursion"),
    (
        {"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]},
        "empty_answer",
        r"conversations\[1\]",
    ),
    ({"caption": ""}, "empty_answer", "caption"),
    ({"caption": 5}, "conversation", "caption is 5"),
    ({"text": "  "}, "empty_answer", "text"),
    ({"conversations": [{"from": "pretrain", "value": "a"}, GPT]}, "role_order", "pretrain"),
    (
        {"conversations": CHAT, "image": "../a.jpg"},
        "outside_root",
        "leads out of the root pictures",
    ),
    ({"conversations": CHAT, "image": "/etc/passwd"}, "outside_root", "/etc/passwd"),
    ({"conversations": CHAT, "video": "a/../../b.mp4"}, "outside_root", "b.mp4"),
]


@pytest.mark.parametrize(("line", "reason", "words"), BAD_LINES)
def test_bad_lines(line, reason, words):
    text = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(RejectError, match=words) as caught:
        parse_record(parse_json(text), root="pictures")
    assert caught.value.reason == reason
    assert reason in REASONS


def test_a_caption_is_an_image_and_an_answer():
    record = parse_record({"image": "a.jpg", "caption": "a fox"}, prompt="Describe it.")
    assert record.conversations == (
        Turn(role="human", text="<image>\nDescribe it."),
        Turn(role="gpt", text="a fox"),
    )
    assert (
        parse_record({"image": ["a.jpg", "b.jpg"], "caption": "two"}).conversations[0].text
        == "<image><image>"
    )


def test_a_text_is_learned_and_may_show_images():
    turns = parse_record({"text": "hello"}).conversations
    assert (
        turns
        == parse_record({"conversations": [{"from": "pretrain", "value": "hello"}]}).conversations
    )
    assert turns == (Turn(role="pretrain", text="hello"),)
    record = parse_record({"text": "see <image> and <image>", "image": ["a.jpg", "b.jpg"]})
    assert record.conversations[0].text == "see <image> and <image>" and len(record.images) == 2
    assert (
        parse_record({"text": "a fox", "image": "a.jpg"}).conversations[0].text == "<image>\na fox"
    )


def test_a_video_and_its_clip():
    record = _parse(video="a.mp4", clip=[1, 2.5])
    assert record.videos == (Video(file=MediaFile(path="pictures/a.mp4"), clip=(1.0, 2.5)),)
    assert record.conversations[0].text == "<video>\nwhat"


def test_media_may_be_in_the_record():
    expected = (MediaFile(path="x.jpg", content=b"1"),)
    assert (
        parse_record({"image": {"bytes": b"1", "path": "x.jpg"}, "caption": "a"}).images == expected
    )
    assert (
        parse_record(
            {"image": "x.jpg", "caption": "a"}, files={"x.jpg": b"1"}, root="pictures"
        ).images
        == expected
    )
    assert parse_record({"image": [b"1", b"2"], "caption": "a"}).images[1].content == b"2"
    assert parse_record({"images": [{"bytes": None, "path": "y.jpg"}], "caption": "a"}).images == (
        MediaFile(path="y.jpg"),
    )


def test_without_a_root_paths_are_taken_as_they_are():
    assert parse_record({"image": "../a.jpg", "caption": "a"}).images == (
        MediaFile(path="../a.jpg"),
    )


def test_keys_that_are_not_read_have_names_that_can_be_written():
    record = parse_record({"caption": "x", "image": "a.jpg", "\ud800": 1, "k" * 1000: 2})
    assert record.unread[0] == "\\ud800" and len(record.unread[1]) < 200
