"""Levels of difficulty: samples that a curriculum trains together, easy levels before hard ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A level is an int8.
MOST_LEVELS = 100


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The level of each sample.

    Args:
        of_sample: int8 [samples], 0 for the easiest; no level is empty.
        bounds: lowest and highest difficulty of each level.
    """

    of_sample: np.ndarray
    bounds: tuple[tuple[float, float], ...]


def find_levels(difficulty: np.ndarray, wanted: int) -> Levels:
    """Cut samples into levels by their difficulty.

    Args:
        difficulty: float [samples].
        wanted: levels of as many samples each as can be, since samples of one difficulty are of one
            level; where a few difficulties are common there are fewer levels. 0: a level for each
            difficulty.

    Raises:
        ValueError: more difficulties than there may be levels.
    """
    values, counts = np.unique(difficulty, return_counts=True)
    if wanted == 0 and len(values) > MOST_LEVELS:
        raise ValueError(
            f"--levels 0: records have {len(values)} different difficulties, and there are"
            f" {MOST_LEVELS} levels at most; use 3, say"
        )
    # The level of a difficulty is that of its middle sample.
    middle = np.cumsum(counts) - counts / 2
    level = (
        np.arange(len(values))
        if wanted == 0
        else (middle * wanted / max(1, counts.sum())).astype(np.int64)
    )
    starts = np.flatnonzero(np.diff(level, prepend=-1))
    ends = np.append(starts[1:], len(values)) - 1
    of_sample = np.searchsorted(values[starts[1:]], difficulty, side="right").astype(np.int8)
    return Levels(
        of_sample=of_sample,
        bounds=tuple(zip(values[starts].tolist(), values[ends].tolist(), strict=True)),
    )
