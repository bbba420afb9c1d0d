"""In what two configurations differ, and what of one was changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_DIGITS = 5e-7


def changed(settings: Any, *names: str, usual: Any = None) -> dict[str, Any]:
    """Return the values of a section that are not as usual, by field.

    Args:
        settings: a section of the configuration.
        names: of the fields to look at; none: all.
        usual: the same section as it usually is; none: with its defaults.
    """
    before = vars(type(settings)() if usual is None else usual)
    return {
        name: value
        for name, value in vars(settings).items()
        if value != before[name] and (not names or name in names)
    }


def values(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field of a configuration."""
    for name, value in vars(section).items():
        if is_dataclass(value):
            yield from values(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def differing(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted path, old value and new value of every field in which two configurations differ.

    Numbers are compared to six digits: a file written by a program that keeps them as float32 has
    9.999999747378752e-06 for 1e-5, and some write CLIP's pixels with a digit less than others.
    """
    if is_dataclass(old) and type(old) is type(new):
        for field in fields(old):
            yield from differing(
                getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
            )
    elif not is_same(old, new):
        yield path, old, new


def is_same(old: Any, new: Any) -> bool:
    """Compare two values; numbers, and those of tuples, to six digits."""
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=_DIGITS)
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return all(map(is_same, old, new))
    return bool(old == new)
