"""The chat template against the tokens of InternVL's own function, and the tokenizer's door."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import (
    SPECIAL_TOKENS,
    add_special_tokens,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
)

GOLDEN = Path(__file__).parents[2] / "golden"
HF_CHAT_TEMPLATE = chat_format("internvl2_5").hf_template()
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="module")
def conversations():
    with gzip.open(GOLDEN / "internvl2_5_chat.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), features_per_tile=4)


def _turns(conversation: dict) -> list[Turn]:
    return [Turn(role=turn["from"], text=turn["value"]) for turn in conversation["conversations"]]


def test_every_golden_conversation(conversations, template):
    assert len(conversations) == 300
    for conversation in conversations:
        tokens, supervised = template.encode(_turns(conversation), conversation["tiles_per_image"])
        assert tokens.dtype == np.int32 and supervised.dtype == np.bool_
        assert tokens.tolist() == conversation["input_ids"]
        assert supervised.astype(int).tolist() == conversation["supervised"]


def test_every_golden_conversation_whose_last_answer_ends_otherwise():
    name = "internvl3_5_gpt_oss"
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens(list(chat_format(name).markers), special_tokens=True)
    template = ChatTemplate(tokenizer, features_per_tile=4, name=name)
    with gzip.open(GOLDEN / f"{name}_chat.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    assert len(found) == 24
    for conversation in found:
        turns = _turns(conversation)
        tiles = conversation["tiles_per_image"]
        tokens, supervised = template.encode(turns, tiles)
        assert tokens.tolist() == conversation["input_ids"]
        assert supervised.astype(int).tolist() == conversation["supervised"]
        assert template.count(turns, tiles) == len(tokens)
        prompt = template.prompt(turns[:-1], tiles)
        assert prompt.tolist() == conversation["input_ids"][: len(prompt)]
        assert tokens[-1] == template.end_token_id
        assert template.text(tokens[len(prompt) :]) == tokenizer.decode(
            tokenizer(turns[-1].text)["input_ids"], skip_special_tokens=True
        )


def test_conversations_before_it_change_no_conversation(conversations, template):
    """The tokens of the last system message are kept."""
    own = [
        conversation
        for conversation in conversations
        if conversation["conversations"][0]["from"] == "system"
    ]
    assert len({conversation["conversations"][0]["value"] for conversation in own}) > 1
    for conversation in (*own, *conversations[:20], *own[::-1]):
        fresh = ChatTemplate(template.tokenizer, features_per_tile=4)
        for encoder in (template, fresh):
            tokens, _ = encoder.encode(_turns(conversation), conversation["tiles_per_image"])
            assert tokens.tolist() == conversation["input_ids"]


def test_a_prompt_is_what_the_sample_begins_with(conversations, template):
    for conversation in conversations:
        turns = _turns(conversation)
        shown = sum(turn.text.count("<image>") for turn in turns[:-1])
        prompt = template.prompt(turns[:-1], conversation["tiles_per_image"][:shown])
        assert conversation["input_ids"][: len(prompt)] == prompt.tolist()
        assert sum(conversation["supervised"][: len(prompt)]) == sum(
            conversation["supervised"]
        ) - template_answer(conversation, len(prompt))


def template_answer(conversation: dict, start: int) -> int:
    """Supervised tokens of the last answer: all tokens from ``start`` on but the newline at the
    end.
    """
    return len(conversation["input_ids"]) - start - 1


def test_a_question_shows_one_image_first(template):
    with_placeholder = template.prompt("<image>\nwhat number", [2])
    assert template.prompt("what number", [2]).tolist() == with_placeholder.tolist()
    assert np.count_nonzero(with_placeholder == template.context_token_id) == 8
    assert (
        template.prompt("what number").tolist()
        == template.prompt([Turn(role="human", text="what number")]).tolist()
    )


def test_an_answer_reads_back(template):
    tokens, supervised = template.encode(
        [Turn(role="human", text="a"), Turn(role="gpt", text="the answer is 你好")], []
    )
    assert tokens[supervised][-1] == template.end_token_id
    assert template.text(tokens[supervised]) == "the answer is 你好"


def test_hugging_face_template_renders_the_same_tokens(conversations, template):
    for conversation in conversations:
        messages = [
            {"role": ROLES[turn.role], "content": turn.text} for turn in _turns(conversation)
        ]
        for message in messages:
            if message["role"] == "user":
                message["content"] = message["content"].replace(
                    "<image>", "<img><IMG_CONTEXT></img>"
                )
        text = template.tokenizer.apply_chat_template(
            messages, chat_template=HF_CHAT_TEMPLATE, tokenize=False
        )
        pieces = text.split("<IMG_CONTEXT>")
        for tiles, place in zip(
            conversation["tiles_per_image"], range(1, len(pieces)), strict=True
        ):
            pieces[place] = "<IMG_CONTEXT>" * (4 * tiles) + pieces[place]
        assert template.tokenizer("".join(pieces))["input_ids"] == conversation["input_ids"]


def test_hugging_face_template_places_images_and_opens_the_answer(template):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what number"}]}
    ]
    text = template.tokenizer.apply_chat_template(
        messages, chat_template=HF_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    expanded = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 4 + "</img>")
    assert template.tokenizer(expanded)["input_ids"] == template.prompt("what number", [1]).tolist()


@pytest.mark.parametrize(
    ("text", "tiles", "counts"),
    [
        ("<image> <image> a", [1], "2 .* 1 images"),
        ("a", [1], "0 .* 1 images"),
        ("<image>", [], "1 .* 0"),
    ],
)
def test_placeholders_and_images_must_agree(template, text, tiles, counts):
    with pytest.raises(RejectError, match=counts) as caught:
        template.encode([Turn(role="human", text=text), Turn(role="gpt", text="a")], tiles)
    assert caught.value.reason == "placeholder_count"


def test_a_placeholder_in_an_answer_is_text(template):
    tokens, _ = template.encode(
        [Turn(role="human", text="a"), Turn(role="gpt", text="write <image>")], []
    )
    assert template.context_token_id not in tokens
    assert template.text(tokens).count("<image>") == 1


@pytest.mark.parametrize("token", ["<img>", "</img>", "<IMG_CONTEXT>"])
@pytest.mark.parametrize("role", ["system", "human", "gpt"])
def test_tokens_of_images_in_a_text_are_refused(template, token, role):
    turns = [
        Turn(role=name, text="a" + (token if name == role else ""))
        for name in ("system", "human", "gpt")
    ]
    with pytest.raises(RejectError, match=token) as caught:
        template.encode(turns, [])
    assert caught.value.reason == "image_token_in_text"


def test_special_tokens_are_added_once_and_in_order(tmp_path):
    tokenizer = _without_special_tokens(tmp_path)
    before = len(tokenizer)
    assert add_special_tokens(tokenizer) == 9
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(before, before + 9))
    assert add_special_tokens(tokenizer) == 0
    tokenizer.save_pretrained(tmp_path / "saved")
    assert fingerprint(load_tokenizer(tmp_path / "saved")) == fingerprint(tokenizer)


def _without_special_tokens(folder: Path):
    """Load the golden tokenizer without InternVL's tokens."""
    facts = json.loads((GOLDEN / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    names = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    kept = sorted(
        (token for token in facts["model"]["vocab"] if token not in SPECIAL_TOKENS),
        key=facts["model"]["vocab"].get,
    )
    facts["model"]["vocab"] = {token: place for place, token in enumerate(kept)}
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] in names]
    (folder / "tokenizer.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend"})
    )
    return load_tokenizer(folder)


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    golden = load_tokenizer(GOLDEN / "tokenizer")
    bare = _without_special_tokens(tmp_path)
    assert (
        fingerprint(golden)
        == fingerprint(load_tokenizer(GOLDEN / "tokenizer"))
        == "48aa8c8346565566bd4039f583f23dbd"
    )
    assert fingerprint(bare) != fingerprint(golden)


def test_an_unfit_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no token <img>"):
        ChatTemplate(_without_special_tokens(tmp_path), 4)
    starts = load_tokenizer(GOLDEN / "tokenizer")
    starts.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(
        ValueError, match=r"turns 'a' into \[0, \d+\]; in front of a text, it may add its bos_token"
    ):
        ChatTemplate(starts, 4)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tokenizer .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match="could not be written: Is a directory"):
        save_tokenizer(load_tokenizer(GOLDEN / "tokenizer"), tmp_path)
