"""Ranks in few words, for messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def named(ranks: Sequence[int]) -> str:
    """Name sorted ranks: ``rank 3``, ``ranks 0-3, 7``."""
    return f"rank {spans(ranks)}" if len(ranks) == 1 else f"ranks {spans(ranks)}"


def spans(ranks: Sequence[int]) -> str:
    """Write sorted numbers in few words: ``0-3, 7, 9-10``."""
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
