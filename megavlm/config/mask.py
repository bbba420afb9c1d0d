"""Freeze masks as text: which weights a pattern of ``training.trainable`` means."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(key: str, pattern: str) -> bool:
    """Whether ``pattern``, a part or a pattern of names, means the weight ``key``."""
    return fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*")
