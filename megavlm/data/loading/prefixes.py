"""Where the samples of a pack are divided for a prefix-LM."""

from __future__ import annotations

import numpy as np

from megavlm.data.loading.batch import Prefixes


def find_prefixes(supervised: np.ndarray, positions: np.ndarray, ends: np.ndarray) -> Prefixes:
    """Find where the samples of a pack are divided, from what is stored of the whole pack.

    Args:
        supervised: bool [t], of the stored tokens.
        positions: int64 [t], their positions in the pack.
        ends: int [N + 1], from 0 to T: where samples start and end.
    """
    starts = ends[:-1].astype(np.int64)
    answers = positions[supervised]
    # Of each sample the first supervised token; behind the last one of the pack there is none.
    firsts = np.append(answers, ends[-1])[np.searchsorted(answers, starts)]
    lengths = np.where(firsts < ends[1:], np.maximum(firsts - starts, 1), 1)
    prefix_ends = np.append(0, np.cumsum(lengths))
    inside = np.arange(prefix_ends[-1]) + np.repeat(starts - prefix_ends[:-1], lengths)
    is_outside = np.ones(int(ends[-1]), bool)
    is_outside[inside] = False
    return Prefixes.of(
        inside=inside,
        outside=np.flatnonzero(is_outside),
        ends=prefix_ends.astype(np.int32),
        lengths=tuple(lengths.tolist()),
    )
