"""Tokens word by word, and their number: those of the tokenizer, for tokenizers of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from megavlm.data.records.record import Turn
from megavlm.data.text import word_tokens
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.data.text.word_tokens import LLAMA3_PATTERN, QWEN2_PATTERN, WordTokens

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"
ALPHABET = [*"abcXYZ019 '.,-_<|>\n\r\t", "'s", "'LL", "  ", "<|im_end|>", "<img>", "\x1c", "word"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(TOKENIZER)
    add_special_tokens(tokenizer)
    return tokenizer


def with_pattern(tokenizer, pattern: str) -> Tokenizer:
    """Return the tokenizer with a pattern of its own, as Qwen2's and Llama 3's have."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    }
    facts["normalizer"] = {"type": "NFC"}
    return Tokenizer.from_str(json.dumps(facts))


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("pattern", ["", QWEN2_PATTERN, LLAMA3_PATTERN])
def test_tokens_are_those_of_the_tokenizer(tokenizer, pattern: str, monkeypatch):
    monkeypatch.setattr(word_tokens, "COMPARED_TEXTS", 0)
    monkeypatch.setattr(word_tokens, "COMPARED_SHARE", 10**9)
    backend = with_pattern(tokenizer, pattern) if pattern else tokenizer.backend_tokenizer
    words = WordTokens(backend)
    assert words._words is not None
    for text in [*texts(3000), "", "naïve", "你好 <|im_end|>"]:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert words.count(text) == len(expected), text
        assert words.encode([text, "b"])[0].tolist() == expected, text


def test_a_tokenizer_of_another_kind_makes_its_tokens_itself(tokenizer):
    # The last finds all that is tried beforehand, and leaves out a sign that is not.
    for pattern in (r"\p{Lu}+|\p{Ll}+|.", "^word|" + QWEN2_PATTERN, r" ?[!-~]+|[\x01-\x20]|\x7f"):
        backend = with_pattern(tokenizer, pattern)
        words = WordTokens(backend)
        assert words._words is None
        expected = backend.encode("One\0two", add_special_tokens=False).ids
        assert words.count("One\0two") == len(expected)
        assert words.encode(["One\0two"])[0].tolist() == expected


def test_settings_that_change_all_tokens_are_the_tokenizers_own(tokenizer, monkeypatch):
    monkeypatch.setattr(word_tokens, "COMPARED_TEXTS", 0)
    monkeypatch.setattr(word_tokens, "COMPARED_SHARE", 10**9)
    text = "word " * 50 + "<img>"
    for setting in ("truncation", "padding", "special"):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        if setting == "truncation":
            backend.enable_truncation(50)
        elif setting == "padding":
            backend.enable_padding(pad_to_multiple_of=64)
        else:
            backend.encode_special_tokens = True
        words = WordTokens(backend)
        expected = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        assert expected != tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert words.count(text) == len(expected)
        assert words.encode([text])[0].tolist() == expected


def test_added_tokens_are_found_in_the_order_of_the_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(word_tokens, "COMPARED_TEXTS", 0)
    monkeypatch.setattr(word_tokens, "COMPARED_SHARE", 10**9)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(name, normalized=True) for name in ("ab<", "|im_end", "bcd")])
    backend.add_tokens([AddedToken("bc", normalized=False)])
    words = WordTokens(backend)
    assert words._words is not None
    for text in ("ab<img>", "a<|im_end|>b", "abcd bc", "ab<x|im_end|"):
        expected = backend.encode(text, add_special_tokens=False).ids
        assert words.count(text) == len(expected), text
        assert words.encode([text])[0].tolist() == expected, text


def test_an_added_token_that_normalizing_changes_is_left_to_the_tokenizer(tokenizer):
    backend = with_pattern(tokenizer, QWEN2_PATTERN)
    backend.add_tokens([AddedToken("\u212a", normalized=True)])  # K, the sign of kelvin
    assert WordTokens(backend)._words is None


def test_words_that_are_cut_otherwise_are_not_taken(tokenizer, monkeypatch):
    monkeypatch.setattr(word_tokens, "_in_ascii", lambda pattern: r"\S+|\s+")
    assert WordTokens(tokenizer.backend_tokenizer)._words is None


def test_words_that_differ_later_are_given_up(tokenizer):
    backend = tokenizer.backend_tokenizer
    right = backend.encode("a  b c", add_special_tokens=False).ids
    words = WordTokens(backend)
    words._words = str.split
    assert [words.count("a  b c") for _ in range(2)] == [len(right)] * 2
    assert words._words is None
    words._words = str.split
    assert [each.tolist() for each in words.encode(["a  b c"] * 2)] == [right] * 2
    assert words._words is None


def test_words_that_differ_after_many_texts_end_the_job(tokenizer):
    words = WordTokens(tokenizer.backend_tokenizer)
    words.encode(["a  b c"] * word_tokens.COMPARED_TEXTS)
    words._words = str.split
    with pytest.raises(RuntimeError, match="'a  b c'.*please report it"):
        words.encode(["a  b c"] * word_tokens.COMPARED_SHARE)


@pytest.mark.parametrize(
    "name", sorted(name for name, row in FORMATS.items() if not row.is_of_pairs)
)
def test_a_template_counts_what_it_encodes(tokenizer, name: str):
    tokenizer.add_tokens([*FORMATS[name].images.added, *FORMATS[name].markers], special_tokens=True)
    if FORMATS[name].gathers_images:
        tokenizer.bos_token = "<|im_start|>"
    second = tokenizer if FORMATS[name].instruction_length else None
    template = ChatTemplate(tokenizer, 5, name=name, qformer_tokenizer=second)
    talk = (
        Turn(role="human", text="<image>\nWhat's <image> in 1999? "),
        Turn(role="gpt", text="Nothing.\n\nSo it is"),
        Turn(role="human", text=" and now?"),
        Turn(role="gpt", text="Still nothing", learned=False),
    )
    talk = talk[:2] if FORMATS[name].is_single else talk
    written = (Turn(role="pretrain", text="Once <image> upon a <image>time"),)
    asked = (Turn(role="system", text="Be brief."), *talk)
    asked = talk if FORMATS[name].is_single else asked
    for turns in (talk, asked, written):
        assert template.count(turns, (3, 1)) == len(template.encode(turns, (3, 1))[0])
