"""The check that most settings share."""

from __future__ import annotations

from collections.abc import Iterator


def at_least(least: int, section: str, values: object, *names: str) -> Iterator[str]:
    """Yield the fields ``names`` that are below ``least``."""
    for name in names:
        value = vars(values)[name]
        if not value >= least:  # a NaN is not either
            yield f"--{section}.{name} {value}: must be {least} or more"
