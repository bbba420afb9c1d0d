"""Tokens of texts, word by word, and their number.

A byte-level BPE (GPT-2's, Qwen2's, Llama 3's) cuts a text into words by a pattern and makes tokens
of each word alone, so the tokens of a text are its words' tokens one after the other, and words
come again. The patterns of these three are known here, for ASCII, where letters and digits are
plain classes; other texts, and tokenizers with anything else, take the tokenizer itself.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any
from unicodedata import is_normalized

import numpy as np

Splitter = Callable[[str], list[str]]

# That of GPT-2, which ByteLevel has inside.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
# Of other patterns one would have to know that Python reads them as the tokenizer does (^, {,2} and
# others mean something else there), that they find a word again where it stands alone, and that
# they leave no sign out.
PATTERNS = (GPT2_PATTERN, QWEN2_PATTERN, LLAMA3_PATTERN)
# The only classes of characters that they have beside those of Python.
ASCII_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
# Texts of all that patterns tell apart, which are compared with the tokenizer's before any other.
TRIED_TEXTS = 100
TRIED_LENGTH = 30
TRIED_SIGNS = (
    *"abcxstmXYZLL0199 ' '.,-_<|>#@\n\n\r\t\x0b\x1c\x7f",
    "'s",
    "'re",
    "'LL",
    "  ",
    "word",
)
# The first counts and texts of each process are compared with the tokenizer's, and then one in so
# many texts.
COMPARED_TEXTS = 200
COMPARED_SHARE = 64
# A hundred megabytes at most, for each of the two tables.
WORDS_KEPT = 2**19


class WordTokens:
    """The tokens of texts, and their number, without those that a tokenizer adds in front.

    Args:
        backend: the tokenizer, of the package tokenizers.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._words, self._special = _splitters(json.loads(backend.to_str()))
        if backend.encode_special_tokens:  # as ordinary text
            self._words = None
        self._counts = _WordTable(lambda word: len(self._by_tokenizer(word)))
        self._tokens = _WordTable(lambda word: self._by_tokenizer(word).tobytes())
        self._counted = self._encoded = 0
        if self._words is not None and not self._holds():
            self._words = None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        if self._words is None or not text.isascii():
            return len(self._by_tokenizer(text))
        parts = self._special(text)
        found = len(parts) // 2
        for part in parts[::2]:
            if part:
                found += sum(map(self._counts.__getitem__, self._words(part)))
        self._counted += 1
        if self._counted <= COMPARED_TEXTS:
            right = len(self._by_tokenizer(text))
            if right != found:
                self._words = None
                return right
        return found

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, int32 [T].

        Raises:
            RuntimeError: the words' tokens were the tokenizer's for a long time, and differ now.
        """
        if self._words is None:
            return self._all_by_tokenizer(texts)
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text; now and then compared with the tokenizer's."""
        if self._words is None or not text.isascii():
            return self._by_tokenizer(text)
        found = self._by_words(text)
        self._encoded += 1
        if self._encoded > COMPARED_TEXTS and self._encoded % COMPARED_SHARE:
            return found
        right = self._by_tokenizer(text)
        if not np.array_equal(right, found):
            if self._encoded > COMPARED_TEXTS:
                raise RuntimeError(
                    f"the tokenizer makes other tokens of the text {text!r:.200} than of its words,"
                    f" after {self._encoded - 1} texts without a difference; please report it"
                )
            self._words = None
        return right

    def _by_words(self, text: str) -> np.ndarray:
        found = []
        for number, part in enumerate(self._special(text)):
            found += map(self._tokens.__getitem__, [part] if number % 2 else self._words(part))
        return np.frombuffer(b"".join(found), np.int32)

    def _holds(self) -> bool:
        """Return whether texts of all kinds of signs have the tokens of their words."""
        rng = random.Random(0)
        texts = ["".join(rng.choices(TRIED_SIGNS, k=TRIED_LENGTH)) for _ in range(TRIED_TEXTS)]
        rights = self._all_by_tokenizer(texts)
        return all(
            np.array_equal(self._by_words(text), right)
            for text, right in zip(texts, rights, strict=True)
        )

    def _by_tokenizer(self, text: str) -> np.ndarray:
        return self._all_by_tokenizer([text])[0]

    def _all_by_tokenizer(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]


class _WordTable(dict):
    """Something about each word that came so far."""

    def __init__(self, look_up: Callable[[str], Any]) -> None:
        super().__init__()
        self._look_up = look_up

    def __missing__(self, word: str) -> Any:
        if len(self) >= WORDS_KEPT:
            self.clear()
        self[word] = self._look_up(word)
        return self[word]


def _splitters(facts: dict[str, Any]) -> tuple[Splitter | None, Splitter]:
    """Return what cuts an ASCII text into words (None: not known), and what cuts it at added
    tokens, which are every second part of the result.

    Args:
        facts: the content of ``tokenizer.json``.
    """
    added = facts.get("added_tokens") or []
    pattern = _pattern(facts)
    if pattern is None or not all(map(_is_plain, added)):
        return None, lambda text: [text]
    # The tokenizer looks for those that are not normalized first.
    cuts = [
        re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})").split
        for is_late in (False, True)
        if (names := [token["content"] for token in added if token["normalized"] is is_late])
    ]
    return re.compile(pattern, re.ASCII).findall, lambda text: _cut([text], cuts)


def _cut(parts: list[str], cuts: Sequence[Splitter]) -> list[str]:
    """Cut every second part, from the first on, by each of ``cuts`` in turn."""
    for cut in cuts:
        found = []
        for number, part in enumerate(parts):
            found += [part] if number % 2 else cut(part)
        parts = found
    return parts


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether an added token is found wherever its content stands in a text, and only there."""
    content = token["content"]
    is_same = not token["normalized"] or is_normalized("NFC", content)
    at_borders = token["single_word"] or token["lstrip"] or token["rstrip"]
    return bool(content) and is_same and not at_borders


def _pattern(facts: dict[str, Any]) -> str | None:
    """Return the pattern of words, for ASCII; None for a tokenizer of another kind."""
    model = facts.get("model") or {}
    normalizer = facts.get("normalizer")
    if facts.get("truncation") or facts.get("padding"):
        return None
    if model.get("type") != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer.get("type") != "NFC":  # NFC leaves ASCII as it is
        return None
    steps = facts.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") if steps.get("type") == "Sequence" else [steps]
    *first, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if not first:
        return _in_ascii(GPT2_PATTERN) if last.get("use_regex", True) else None
    split = first[0]
    if (
        last.get("use_regex", True)
        or split.get("type") != "Split"
        or split.get("behavior") != "Isolated"
        or split.get("invert")
    ):
        return None
    return _in_ascii((split.get("pattern") or {}).get("Regex", ""))


def _in_ascii(pattern: str) -> str | None:
    """Rewrite a pattern for ASCII; None for one that is not known."""
    if pattern not in PATTERNS:
        return None
    for name, plain in ASCII_CLASSES.items():
        # Outside of brackets a class needs its own.
        parts = re.split(r"(\[[^\]]*\])", pattern)
        parts[::2] = [part.replace(name, f"[{plain}]") for part in parts[::2]]
        parts[1::2] = [part.replace(name, plain) for part in parts[1::2]]
        pattern = "".join(parts)
    return pattern
