"""Patterns of parameter names: what a pattern of ``training.trainable`` and the like means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from megavlm.config.architecture import Architecture

PARTS = ("vision", "connector", "language")
_LAYERS = re.compile(r"(vision|language)\.layers\.(-?\d+)?(:)?(-?\d+)?")
_STACKS = {"vision": "vision.encoder.layers", "language": "language.decoder.layers"}


def expand(pattern: str, architecture: Architecture) -> tuple[str, ...]:
    """Return the names of layers that a range such as ``vision.layers.-4:`` means, which is read as
    a slice of Python; any other pattern is returned as it is.

    Raises:
        ValueError: the range holds no layer.
    """
    found = _LAYERS.fullmatch(pattern)
    if not found:
        return (pattern,)
    part, first, colon, end = found.groups()
    count = getattr(architecture, part).num_layers
    layers = range(count)
    start = int(first) if first else None
    if colon:
        chosen = layers[start : int(end) if end else None]
    else:
        chosen = [layers[start]] if start is not None and -count <= start < count else []
    if not chosen:
        raise ValueError(f"{pattern}: no such layers; the model has {part} layers 0 to {count - 1}")
    return tuple(f"{_STACKS[part]}.{number}" for number in chosen)


def matches(key: str, pattern: str) -> bool:
    """Whether ``pattern``, a part or a pattern of names, means the weight ``key``."""
    return fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*")


def parts_named(pattern: str) -> list[str]:
    """Parts that a name, or a pattern of names, can mean."""
    return [part for part in PARTS if fnmatchcase(part, pattern.split(".")[0])]


def trains(part: str, trainable: Sequence[str]) -> bool:
    """Whether a mask can mean any weight of a part."""
    return any(part in parts_named(pattern) for pattern in trainable)
