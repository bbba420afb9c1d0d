"""The 1F1B schedule of megatron-core, plain and interleaved, and the microbatches in flight.

A rank first runs some microbatches forward (warm-up), then alternates: one forward, one backward.
Interleaved 1F1B (several model chunks per rank; Narayanan et al., arXiv 2104.04473, section 2.2)
runs as many microbatches as there are ranks through the first chunk, then the same ones through the
second, and so on; backward from the last chunk to the first.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def warm_up(pipeline: int, rank: int, virtual: int, packs: int) -> int:
    """Count the forward passes of chunks before the first backward pass.

    Args:
        pipeline: ranks of the pipeline.
        rank: one of them.
        virtual: model chunks per rank.
        packs: microbatches of a step on this data-parallel rank.
    """
    ahead = pipeline - rank - 1
    return min(ahead if virtual == 1 else 2 * ahead + (virtual - 1) * pipeline, virtual * packs)


@lru_cache(maxsize=4096)
def in_flight(pipeline: int, rank: int, virtual: int, packs: int) -> np.ndarray:
    """Count the microbatches of each chunk of a rank that have run forward and not yet backward,
    after every forward pass: int [passes, virtual].

    Only the start of a step is simulated, when most are in flight. Arguments as for ``warm_up``.
    """
    simulated = min(packs, 3 * pipeline)
    chunks = (
        (np.arange(virtual * simulated) // pipeline) % virtual
        if virtual > 1
        else np.zeros(simulated, int)
    )
    forward = np.eye(virtual, dtype=int)[chunks]
    backward = np.roll(forward[:, ::-1], warm_up(pipeline, rank, virtual, packs) + 1, axis=0)
    backward[: warm_up(pipeline, rank, virtual, packs) + 1] = 0
    return np.cumsum(forward - backward, axis=0)


def bubble(pipeline: int, virtual: int, packs: int) -> float:
    """Return the bubble ratio, idle time over working time: (ranks - 1) / (virtual * packs)."""
    return (pipeline - 1) / (virtual * packs)
