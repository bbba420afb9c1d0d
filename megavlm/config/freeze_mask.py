"""Patterns of parameter names: what a pattern of ``training.trainable`` and the like means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

PARTS = ("vision", "connector", "language", "objective")


def matches(key: str, pattern: str) -> bool:
    """Whether ``pattern``, a part or a pattern of names, means the weight ``key``."""
    return fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*")


def matches_any(key: str, patterns: Iterable[str]) -> bool:
    """Whether any of ``patterns``, such as those of a freeze mask, means the weight ``key``."""
    return any(matches(key, pattern) for pattern in patterns)


@lru_cache(maxsize=1024)
def parts_named(pattern: str) -> tuple[str, ...]:
    """Parts that a name, or a pattern of names, can mean."""
    return tuple(part for part in PARTS if fnmatchcase(part, pattern.split(".")[0]))


def trains(part: str, trainable: Sequence[str]) -> bool:
    """Whether a mask can mean any weight of a part."""
    return any(part in parts_named(pattern) for pattern in trainable)
