"""Checks of every number of a configuration, whatever it is for."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.differences import values
from megavlm.config.schema import Config

_MOST = 2**63 - 1


def number_problems(config: Config) -> Iterator[str]:
    """Name the integers that do not fit in 64 bits."""
    for key, value in values(config):
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > _MOST for number in numbers):
            yield f"--{key} {value}: must be at most {_MOST} (2**63 - 1)"
