"""Checks of every number of a configuration, whatever it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megavlm.config.differences import values
from megavlm.config.schema import Config

_MOST = 2**63 - 1


def number_problems(config: Config) -> Iterator[str]:
    """Name the integers that do not fit in 64 bits."""
    for key, value in values(config):
        if any(isinstance(number, int) and abs(number) > _MOST for number in _numbers(value)):
            yield f"--{key} {value}: must be at most {_MOST} (2**63 - 1)"


def finite_problems(config: Config) -> Iterator[str]:
    """Name the numbers that are infinite, or NaN."""
    for key, value in values(config):
        numbers = _numbers(value)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield f"--{key} {value}: must be a finite number"


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
