"""How unequal the work of the packs that make up a step is."""

from __future__ import annotations

import numpy as np

RANKS = 512
_DRAWS = 200


def expected_peak(work: np.ndarray, *, ranks: int = RANKS) -> float:
    """Return the expected most work among ``ranks`` random packs, over the mean of all packs.

    Args:
        work: of each pack, such as its number of tiles.
        ranks: packs of a step, one for each rank.

    Returns:
        1 if all packs have the same work, or none has any; 1.03 if ranks wait 3% of the time.
    """
    if not work.any():
        return 1.0
    draws = np.random.default_rng(0).choice(work, (_DRAWS, ranks))
    return float(draws.max(axis=1).mean() / work.mean(dtype=np.float64))
