"""Checks of every number of a configuration, whatever it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from megavlm.config.schema import Config

_MOST = 2**63 - 1


def number_problems(config: Config) -> Iterator[str]:
    """Name the integers that do not fit in 64 bits."""
    for key, value in _values(config):
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > _MOST for number in numbers):
            yield f"--{key} {value}: must be at most {_MOST} (2**63 - 1)"


def _values(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _values(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", value
