"""Records of two answers to one prompt: each form that people write them in becomes the same
record, and what is no preference is refused with its reason.
"""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from megavlm.data.records.json_reader import HEAD_BYTES
from megavlm.data.records.parse import parse_record
from megavlm.data.records.preferences import ANSWER_KEYS, PROMPTS
from megavlm.data.records.readers import open_reader
from megavlm.data.records.record import MediaFile, Record, Turn
from megavlm.data.records.reject import REASONS, RejectError

HUMAN = {"from": "human", "value": "q"}
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
GPT_GOOD = {"from": "gpt", "value": "good"}
GPT_BAD = {"from": "gpt", "value": "bad"}
PARTS = [{"type": "text", "text": "q"}]
BOTH = {"chosen": "good", "rejected": "bad"}

# All say the same.
SAME = [
    # InternVL's MMPR
    {"question": "q", **BOTH},
    # LLaMA-Factory: sharegpt, openai, alpaca; and its DPO-En-Zh-20k, whose answers are texts
    {"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD},
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {"instruction": "q", "input": "", **BOTH},
    {"conversations": [HUMAN], **BOTH},
    # TRL: standard, conversational, with parts as vision datasets have, and implicit prompts, also
    # beside a prompt as in ultrafeedback_binarized
    {"prompt": "q", **BOTH},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    {
        "prompt": [{"role": "user", "content": PARTS}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "bad"}]}],
    },
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    # ms-swift: messages, sharegpt, query and response
    {"messages": [USER, GOOD], "rejected_response": "bad"},
    {"conversations": [HUMAN, GPT_GOOD], "rejected_response": "bad"},
    {"query": "q", "response": "good", "rejected_response": "bad"},
    {"query": "q", **BOTH},
]


def read(fields: dict) -> Record:
    return parse_record(fields, preferences=True)


@pytest.mark.parametrize("fields", SAME)
def test_forms_of_one_preference(fields: dict):
    record = read(fields)
    assert record.conversations == (Turn(role="human", text="q"), Turn(role="gpt", text="good"))
    assert (record.rejected, record.unread) == (Turn(role="gpt", text="bad"), ())


@pytest.mark.parametrize("fields", SAME)
def test_other_records_have_no_place_for_two_answers(fields: dict):
    with pytest.raises(RejectError, match=r"unsupported: .*pack_dataset.py --preferences reads"):
        parse_record(fields)


def test_every_row_of_the_tables_is_tried():
    tried = {key for fields in SAME for key in fields}
    assert {key for form in PROMPTS for key in form.keys} | set(ANSWER_KEYS) <= tried


EARLIER = [
    {"messages": [USER, GOOD, {"role": "user", "content": "r"}], "chosen": GOOD, "rejected": BAD},
    {"messages": [USER, GOOD, {"role": "user", "content": "r"}, GOOD], "rejected_response": "bad"},
    {"question": "r", "history": [["q", "good"]], **BOTH},
    {"prompt": [USER, GOOD, {"role": "user", "content": "r"}], "chosen": [GOOD], "rejected": [BAD]},
    {
        "chosen": [USER, GOOD, {"role": "user", "content": "r"}, GOOD],
        "rejected": [USER, GOOD, {"role": "user", "content": "r"}, BAD],
    },
]


@pytest.mark.parametrize("fields", EARLIER)
def test_earlier_answers_are_not_learned(fields: dict):
    record = read({"system": "s", **fields})
    assert record.conversations == (
        Turn(role="system", text="s"),
        Turn(role="human", text="q"),
        Turn(role="gpt", text="good", learned=False),
        Turn(role="human", text="r"),
        Turn(role="gpt", text="good"),
    )
    assert record.rejected == Turn(role="gpt", text="bad")


def test_images_and_videos_stand_in_the_prompt():
    mmpr = {"id": 7, "image": "a.jpg", "question": "what", **BOTH}
    record = parse_record(mmpr, root="pictures", preferences=True)
    assert record.conversations[0].text == "<image>\nwhat"
    assert record.images == (MediaFile(path="pictures/a.jpg"),)
    assert record.unread == ("id",)
    film = read({"video": "a.mp4", "question": "what", **BOTH})
    assert film.conversations[0].text == "<video>\nwhat" and len(film.videos) == 1
    parts = [{"type": "image"}, {"type": "text", "text": "what"}]
    ask = {"role": "user", "content": parts}
    for fields in (
        {"prompt": [ask], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ask, GOOD], "rejected": [ask, BAD]},
    ):
        trl = read({**fields, "images": ["b.jpg"]})
        assert trl.conversations[0].text == "<image>what"
        assert trl.images == (MediaFile(path="b.jpg"),)
    of_parts = {"role": "user", "content": [{"type": "image", "image": "c.jpg"}]}
    whole = read({"chosen": [of_parts, GOOD], "rejected": [of_parts, BAD]})
    assert whole.images == (MediaFile(path="c.jpg"),)  # once, though both name it
    said = read({"image": "a.jpg", "caption": "a fox", "rejected_response": "a dog"})
    assert [turn.text for turn in said.conversations] == ["<image>", "a fox"]


OTHER_ASK = {"role": "user", "content": "other"}
REFUSED = [
    ({"conversations": [HUMAN, GPT_GOOD]}, "no_preference", "none of chosen, rejected, rej"),
    ({"text": "a document"}, "no_preference", "--preferences takes"),
    ({"question": "q", "chosen": "good"}, "no_preference", "the record has chosen;"),
    ({"question": "q", **BOTH, "rejected_response": "x"}, "no_preference", "chosen and rejected"),
    ({"question": "q", "chosen": "good", "rejected": None}, "no_preference", "has chosen;"),
    (BOTH, "conversation", "without a prompt: none of conversations, messages, prompt, question"),
    ({"question": "q", "chosen": "x", "rejected": "x"}, "same_answers", "both answers are 'x'"),
    ({"messages": [USER, GOOD], "rejected_response": "good"}, "same_answers", "'good'"),
    ({"question": "q", "chosen": "good", "rejected": " "}, "empty_answer", "rejected"),
    ({"question": "q", "chosen": "good", "rejected": 5}, "conversation", "rejected is 5, not"),
    ({"question": "q", "chosen": ["good"], "rejected": ["bad"]}, "conversation",
     "chosen is 'good'"),
    ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, "conversation",
     "chosen is [{"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "role_order", "what human says"),
    ({"chosen": [USER, GOOD], "rejected": [OTHER_ASK, BAD]}, "conversation", "no common prompt"),
    ({"chosen": [USER, GOOD], "rejected": [BAD]}, "conversation", "rejected is [{"),
    ({"chosen": [USER], "rejected": [USER]}, "conversation", "not a conversation as the other"),
    ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "conversation",
     "prompt is not the prompt"),
    ({"messages": [OTHER_ASK], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "conversation",
     "messages is not"),
    ({"messages": [USER, GOOD], **BOTH}, "role_order", "human, gpt, gpt"),
    ({"messages": [USER], "rejected_response": "bad"}, "role_order", "that end with human"),
    ({"text": "a document", "rejected_response": "bad"}, "unsupported", "learned as a whole"),
    ({"conversations": [{"from": "pretrain", "value": "x"}], **BOTH}, "role_order", "pretrain"),
    ({"conversations": [HUMAN], "chosen": {**GPT_GOOD, "loss": False}, "rejected": GPT_BAD},
     "unsupported", "the preferred answer has loss or weight 0"),
    ({"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": {**GPT_BAD, "weight": 0}},
     "unsupported", "the rejected answer has loss or weight 0"),
    ({"messages": [USER, {**GOOD, "loss": 0}], "rejected_response": "bad"}, "unsupported",
     "the preferred answer"),
    ({"messages": [USER, GOOD], "rejected_response": "bad", "rejected_images": ["b.jpg"]},
     "unsupported", "rejected_images, which is not supported"),
    ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, "unsupported",
     "rejected_messages"),
    ({"prompt": [USER], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
      "rejected": [BAD]}, "placeholder_count", "chosen holds an image"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason", "words"), REFUSED)
def test_what_is_no_preference_is_refused(fields: dict, reason: str, words: str):
    with pytest.raises(RejectError) as caught:
        read(fields)
    assert (caught.value.reason, words in caught.value.detail) == (reason, True), caught.value
    assert reason in REASONS


def test_keys_of_answers_that_are_not_read_are_counted():
    record = read(
        {
            "conversations": [{**HUMAN, "time": 1}],
            "chosen": {**GPT_GOOD, "score": 5},
            "rejected": {**GPT_BAD, "score": 1},
        }
    )
    assert record.unread == ("chosen.score", "conversations[].time", "rejected.score")


def test_files_of_preferences_are_read(tmp_path):
    """A file of JSON is not mistaken for one list of records if its first record has lists, and a
    table may hold turns as lists of structs.
    """
    long = {**USER, "content": "q" * 2 * HEAD_BYTES}
    shown = {"boxes": [{"text": "in the image"}], "question": "q", **BOTH}
    for name, first in (
        ("long", {"chosen": [long, GOOD], "rejected": [long, BAD]}),
        ("shown", shown),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(first) + "\n" + json.dumps(SAME[0]) + "\n")
        (extent,) = open_reader(str(path)).ranges(10)
        raws = open_reader(str(path)).read(0, 1, extent.records)
        assert [read(raw.fields()).rejected.text for raw in raws] == ["bad", "bad"]
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "images": [{"bytes": b"1"}]}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (raw,) = open_reader(str(tmp_path / "a.parquet")).read(0, 1, 1)
    record = read(raw.fields())
    assert record.rejected.text == "bad" and record.images[0].content == b"1"
