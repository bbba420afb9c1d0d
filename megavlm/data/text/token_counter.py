"""Count the tokens of a text without making them, as the first pass of the packer needs.

A byte-level BPE (GPT-2's, Qwen2's, Llama 3's) cuts a text into words by a pattern and makes tokens
of each word alone, so the tokens of a text are the sum of its words' tokens, and words come again.
The pattern is rewritten for ASCII, where letters and digits are plain classes; other texts, and
tokenizers of other kinds, take the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# That of GPT-2, which ByteLevel has inside.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Patterns hold no other class of characters than these; in ASCII they are plain.
ASCII_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
# Each counter compares its first counts with the tokenizer's.
COMPARED_TEXTS = 200
# A hundred megabytes at most.
WORDS_KEPT = 2**19


class TokenCounter:
    """The number of tokens of texts.

    Args:
        backend: the tokenizer, of the package tokenizers.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._words, self._special = _splitters(json.loads(backend.to_str()))
        self._counts = _WordCounts(self._by_tokenizer)
        self._compared = 0

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without those that a tokenizer adds in front."""
        if self._words is None or not text.isascii():
            return self._by_tokenizer(text)
        parts = self._special(text)
        found = len(parts) - 1
        for part in parts:
            if part:
                found += sum(map(self._counts.__getitem__, self._words(part)))
        if self._compared < COMPARED_TEXTS:
            self._compared += 1
            right = self._by_tokenizer(text)
            if right != found:
                self._words = None
                return right
        return found

    def _by_tokenizer(self, text: str) -> int:
        return len(self._backend.encode_batch_fast([text], add_special_tokens=False)[0])


class _WordCounts(dict):
    """The number of tokens of each word that came so far."""

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS_KEPT:
            self.clear()
        self[word] = self._count(word)
        return self[word]


def _splitters(
    facts: dict[str, Any],
) -> tuple[Callable[[str], list[str]] | None, Callable[[str], list[str]]]:
    """Return what cuts an ASCII text into words (None: not known), and what cuts it at special
    tokens.

    Args:
        facts: the content of ``tokenizer.json``.
    """
    added = facts.get("added_tokens") or []
    pattern = _pattern(facts)
    if pattern is None or any(
        token["single_word"] or token["lstrip"] or token["rstrip"] for token in added
    ):
        return None, lambda text: [text]
    names = sorted((token["content"] for token in added), key=len, reverse=True)
    if not names:
        return re.compile(pattern, re.ASCII).findall, lambda text: [text]
    special = re.compile("|".join(map(re.escape, names)))
    return re.compile(pattern, re.ASCII).findall, special.split


def _pattern(facts: dict[str, Any]) -> str | None:
    """Return the pattern of words, for ASCII; None for a tokenizer of another kind."""
    model = facts.get("model") or {}
    normalizer = facts.get("normalizer")
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
    """Rewrite a pattern for ASCII; None for one that has more than the classes known here."""
    if not pattern or re.search(r"(?<!\\)\((?!\?)", pattern):  # a group would change what is found
        return None
    for name, plain in ASCII_CLASSES.items():
        # Outside of brackets a class needs its own.
        parts = re.split(r"(\[(?:\\.|[^\]\\])*\])", pattern)
        parts[::2] = [part.replace(name, f"[{plain}]") for part in parts[::2]]
        parts[1::2] = [part.replace(name, plain) for part in parts[1::2]]
        pattern = "".join(parts)
    if re.search(r"\\[pPkKXRhH]", pattern):
        return None
    try:
        re.compile(pattern, re.ASCII)
    except re.error:
        return None
    return pattern
