"""Packs of similar samples: filled in the order in which ``tools/score_dataset.py --places`` puts
the records, so that pairs that are hard to tell apart share a pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megavlm.data.packing.best_fit import Packing, check_sizes
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.scores import open_scores


def places_of(
    numbers: np.ndarray, lines: np.ndarray, sources: Sequence[Annotations], folder: str
) -> np.ndarray:
    """Return the places of samples, int64 [samples]; behind all others if a record has none.

    Args:
        numbers: of the source of each sample.
        lines: of its record.
        sources: of the records.
        folder: of the scores.
    """
    found = np.full(len(lines), np.iinfo(np.int64).max)
    for number, source in enumerate(sources):
        places = open_scores(folder).of(source.path).places
        own = np.flatnonzero((numbers == number) & (lines <= len(places)))
        known = places[lines[own] - 1]
        found[own[known >= 0]] = known[known >= 0]
    return found


def places_in_turns(places: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the places of samples on a path that is walked once for each time that a sample is
    taken, int64 [samples]: side by side, a pair and its copy would be negatives of each other.

    Args:
        places: of each sample, int [samples].
        rows: of the scan, that samples are taken from [samples].
    """
    order = np.argsort(rows, kind="stable")
    turns = np.empty(len(rows), np.int64)
    turns[order] = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    found = np.empty(len(rows), np.int64)
    found[np.lexsort((places, turns))] = np.arange(len(rows))
    return found


def fill_in_order(
    tokens: np.ndarray, tiles: np.ndarray, places: np.ndarray, *, capacity: int, tile_cap: int
) -> Packing:
    """Put samples into packs in the order of their places, each pack as full as the next sample
    allows.

    Args:
        tokens, tiles: of each sample, int [samples].
        places: of each, int [samples].
        capacity: most tokens of a pack.
        tile_cap: most tiles of a pack.

    Raises:
        ValueError: a sample that no pack can hold.
    """
    check_sizes(tokens, tiles, capacity, tile_cap)
    order = np.argsort(places, kind="stable")
    numbers = np.empty(len(order), np.int32)
    pack = 0
    held = 0
    shown = 0
    sizes = zip(tokens[order].tolist(), tiles[order].tolist(), strict=True)
    for index, (length, images) in enumerate(sizes):
        if held + length > capacity or shown + images > tile_cap:
            pack += 1
            held = 0
            shown = 0
        held += length
        shown += images
        numbers[index] = pack
    bin_of = np.empty_like(numbers)
    bin_of[order] = numbers
    return Packing(bin_of=bin_of, bins=pack + 1 if len(order) else 0)
