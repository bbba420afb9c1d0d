"""In which order a pipeline rank works, as megatron-core's schedules have it, and so how many packs
it keeps at a time.

A rank first runs some packs forward (warm-up), then takes turns, one forward, one backward. With
several chunks on a rank (Narayanan et al., arXiv 2104.04473, section 2.2) it takes them in turn
too: as many packs as there are ranks through its first chunk, then the same packs through its
second, and so on; backward from its last chunk to its first.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def warm_up(pipeline: int, rank: int, virtual: int, packs: int) -> int:
    """Forward passes of chunks before the first backward pass.

    Args:
        pipeline: ranks of the pipeline.
        rank: one of them.
        virtual: chunks of each rank.
        packs: of a step, on this data-parallel rank.
    """
    ahead = pipeline - rank - 1
    return min(ahead if virtual == 1 else 2 * ahead + (virtual - 1) * pipeline, virtual * packs)


@lru_cache(maxsize=4096)
def under_way(pipeline: int, rank: int, virtual: int, packs: int) -> np.ndarray:
    """Packs of each chunk of a rank that have gone forward and not backward, after every forward
    pass: int [passes, virtual].

    Only the start of a step is looked at, which is when most are under way. Arguments as for
    ``warm_up``.
    """
    looked_at = min(packs, 3 * pipeline)
    turns = (
        (np.arange(virtual * looked_at) // pipeline) % virtual
        if virtual > 1
        else np.zeros(looked_at, int)
    )
    forward = np.eye(virtual, dtype=int)[turns]
    backward = np.roll(forward[:, ::-1], warm_up(pipeline, rank, virtual, packs) + 1, axis=0)
    backward[: warm_up(pipeline, rank, virtual, packs) + 1] = 0
    return np.cumsum(forward - backward, axis=0)


def bubble(pipeline: int, virtual: int, packs: int) -> float:
    """Time in which a rank waits for the others, as a share of the time in which it works: (ranks -
    1) / (virtual * packs).
    """
    return (pipeline - 1) / (virtual * packs)
