"""Every form that people write records in becomes the same record, and content that has no place
in one is refused or reported.
"""

from __future__ import annotations

import base64
import json

import pyarrow
import pyarrow.parquet
import pytest

from megavlm.data.records.forms import FORMS
from megavlm.data.records.meta_file import single_source
from megavlm.data.records.parse import parse_record
from megavlm.data.records.readers import open_reader
from megavlm.data.records.record import MediaFile, Turn
from megavlm.data.records.reject import REASONS, RejectError
from tests.data.records.test_readers import tar

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}
ONE_TURN = (Turn(role="human", text="q"), Turn(role="gpt", text="a"))
URL = "data:image/png;base64," + base64.b64encode(b"pixels").decode()

SAME = [
    {"conversations": [HUMAN, GPT]},
    {"messages": [USER, ANSWER]},
    {"conversations": [USER, ANSWER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
    {"query": "q", "response": "a", "history": []},
    {"instruction": "q", "input": "", "output": "a"},
    {"question": "q", "answer": "a"},
    {"texts": [{"user": "q", "assistant": "a"}]},
]


@pytest.mark.parametrize("fields", SAME)
def test_forms_of_one_conversation(fields: dict):
    record = parse_record(fields)
    assert (record.conversations, record.unread) == (ONE_TURN, ())


def test_every_row_of_the_table_is_tried():
    tried = {key for fields in SAME for key in fields} | {"caption", "file_name", "text"}
    tried |= {"text_list", "image_info"}
    assert {key for form in FORMS for key in form.keys} <= tried


def test_images_of_messages_are_parts_or_listed():
    parts = [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "b.jpg"},
    ]
    record = parse_record({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert record.conversations[0].text == "<image>and<image>"
    assert record.images == (
        MediaFile(path="the record's image", content=b"pixels"),
        MediaFile(path="b.jpg"),
    )
    listed = [{"type": "image"}, {"type": "text", "text": "q"}]
    record = parse_record(
        {"messages": [{"role": "user", "content": listed}, ANSWER], "images": ["a.jpg"]}
    )
    assert record.images == (MediaFile(path="a.jpg"),)


def test_a_system_message_beside_the_conversation_is_read():
    for key in ("system", "system_prompt"):
        record = parse_record({key: "be brief", "conversations": [HUMAN, GPT]})
        assert record.conversations == (Turn(role="system", text="be brief"), *ONE_TURN)


def test_turns_without_loss():
    for flag in ({"loss": False}, {"weight": 0}):
        silent = {**GPT, **flag}
        record = parse_record({"conversations": [HUMAN, silent, HUMAN, GPT]})
        assert [turn.learned for turn in record.conversations] == [True, False, True, True]


def test_interleaved_documents():
    obelics = parse_record({"texts": ["one", None, "two"], "images": [None, b"1", None]})
    assert obelics.conversations == (Turn(role="pretrain", text="one\n<image>\ntwo"),)
    assert [image.content for image in obelics.images] == [b"1"]
    info = [
        {"image_name": "b.jpg", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "a.jpg", "matched_text_index": 0},
    ]
    mmc4 = parse_record({"text_list": ["one.", "two."], "image_info": info})
    assert mmc4.conversations[0].text == "<image>one. <image>two."
    assert [image.path for image in mmc4.images] == ["a.jpg", "b.jpg"]


def test_the_cauldron_shows_its_images_first():
    texts = [{"user": "q", "assistant": "a", "source": "x"}]
    record = parse_record({"texts": texts, "images": [{"bytes": b"1", "path": None}, b"2"]})
    assert record.conversations[0].text == "<image>\n<image>\nq"
    assert record.unread == ("texts[].source",)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"image": None, "images": ["a.jpg"]}, "a.jpg"),
        ({"image_path": "a.jpg"}, "a.jpg"),
        ({"jpg": b"1"}, "the record's image"),
        ({"file_name": "a.jpg", "image": "b.jpg"}, "b.jpg"),
        ({"image": "", "img": "a.jpg"}, "a.jpg"),
    ],
)
def test_images_under_other_names(fields: dict, name: str):
    record = parse_record({"conversations": [HUMAN, GPT], **fields})
    assert [image.path for image in record.images] == [name]
    assert record.conversations[0].text == "<image>\nq"


def test_an_imagefolder_s_text_is_a_caption(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a fox"}\n')
    (source,) = single_source(tmp_path)
    (raw,) = open_reader(source.path).read(0, 1, 1)
    record = parse_record(raw.fields(), root=source.root)
    assert record.images == (MediaFile(path=str(tmp_path / "a.png")),)
    assert [turn.role for turn in record.conversations] == ["human", "gpt"]
    with pytest.raises(RejectError, match="file_name is null"):
        parse_record({"file_name": None, "text": "a fox"}, root=source.root)


def test_img2dataset_is_read_from_tables_and_archives(tmp_path):
    row = {"jpg": b"1", "caption": "a fox", "key": "000", "width": 4}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    facts = {"caption": "a fox", "url": "https://x/a.jpg", "key": "000", "image_path": "old.jpg"}
    files = {"000.jpg": b"1", "000.txt": b"?", "000.npy": b"2"}
    tar(tmp_path / "a.tar", {**files, "000.json": json.dumps(facts).encode()})
    for name, unread in (("a.parquet", ("key", "width")), ("a.tar", (".npy", "key", "url"))):
        (raw,) = open_reader(str(tmp_path / name)).read(0, 1, 1)
        record = parse_record(raw.fields(), files=raw.files)
        assert record.images[0].content == b"1"
        assert record.conversations[1].text == "a fox"
        assert record.unread == unread


def test_images_and_videos_in_one_record():
    text = {"from": "human", "value": "<video><image><video>"}
    record = parse_record(
        {"conversations": [text, GPT], "videos": ["a.mp4", "b.mp4"], "image": "c.jpg"}
    )
    assert (len(record.videos), len(record.images)) == (2, 1)
    llava = parse_record({"conversations": [{**HUMAN, "value": "<image>\nq"}, GPT], "video": "a"})
    assert llava.conversations[0].text == "<video>\nq"


REFUSED = [
    ({"caption": "a cat"}, "missing_media", "caption without an image"),
    ({"video": "", "conversations": [{**HUMAN, "value": "<video>"}, GPT]}, "placeholder_count",
     "1 <video> placeholders, but 0 videos"),
    ({"tools": "[{}]", "conversations": [HUMAN, GPT]}, "unsupported", "tools"),
    ({"conversations": [HUMAN, {**GPT, "tool_calls": [1]}]}, "unsupported", "tool_calls"),
    ({"conversations": [HUMAN, {**GPT, "weight": 0.5}]}, "unsupported", "weight 0.5"),
    ({"conversations": [{**HUMAN, "loss": True}, GPT]}, "unsupported", "loss True"),
    ({"conversations": [HUMAN, {**GPT, "loss": False}]}, "empty_answer", "no answer is learned"),
    ({"image": "a.jpg", "images": ["b.jpg"], "conversations": [HUMAN, GPT]}, "image_field",
     "image and images name different"),
    ({"image": "ftp://x/a.jpg", "conversations": [HUMAN, GPT]}, "image_field", "a URL of another"),
    ({"image": "a.jpg", "conversations": [{"from": "system", "value": "see <image>"}, HUMAN, GPT]},
     "placeholder_count", "a system turn holds <image>"),
    ({"system": "x", "messages": [{"role": "system", "content": "y"}, USER, ANSWER]}, "role_order",
     "system and a system turn differ"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]}, "unsupported",
     "part 0"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["a.mp4", "b.mp4"]}]},
     ANSWER]}, "video_field", "'b.mp4'] is not the path or the bytes of one video"),
    ({"texts": ["a", "b"], "images": [None, b"1"]}, "conversation", "one must be null"),
    ({"text_list": ["a"], "image_info": [{"matched_text_index": 4}]}, "conversation", "4 is not"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason", "words"), REFUSED)
def test_content_that_has_no_place_is_refused(fields: dict, reason: str, words: str):
    with pytest.raises(RejectError) as caught:
        parse_record(fields)
    assert (caught.value.reason, words in caught.value.detail) == (reason, True), caught.value
    assert reason in REASONS


def test_details_are_short_and_printable():
    for text in ("\ud800" * 3, "x" * 100_000, "a\nb\x00\u202e"):
        with pytest.raises(RejectError) as caught:
            parse_record({"conversations": [{"from": text, "value": "a"}, GPT]})
        caught.value.detail.encode()
        assert len(caught.value.detail) < 500 and caught.value.detail.isprintable()
