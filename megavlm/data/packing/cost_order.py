"""The order in which packs are stored: neighbours cost alike, so that packs that are taken from one
neighbourhood, and computed at the same time, do too.

Every rank of a step waits for the slowest. Packs of one length still differ in the vision encoder's
work (tiles) and in attention's (the sum of squared sample lengths, several times as much for one
long sample as for many short ones). The packs are cut into strips of like attention cost, and each
strip runs up or down in tiles, so that the end of one is like the start of the next. ``Plan`` takes
each group of a step's packs from such a neighbourhood, and shuffles neighbourhoods and the packs
inside each by the run's seed.
"""

from __future__ import annotations

import numpy as np

STRIPS = 16


def storage_order(squared_lengths: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Return the index at which each pack is stored, int64 [packs].

    Args:
        squared_lengths: [packs], sum of the squares of a pack's sample lengths.
        tiles: [packs], tiles of each pack.
    """
    packs = len(tiles)
    by_attention = np.empty(packs, np.int64)
    by_attention[np.argsort(squared_lengths, kind="stable")] = np.arange(packs)
    strips = by_attention * STRIPS // max(packs, 1)
    stored_at = np.empty(packs, np.int64)
    stored_at[np.lexsort((by_attention, np.where(strips % 2, -tiles, tiles), strips))] = np.arange(
        packs
    )
    return stored_at
