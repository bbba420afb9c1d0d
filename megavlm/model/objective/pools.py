"""Which pairs of a step are contrasted with each other, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class PoolOfPack:
    """Where a pack of this rank stands among the pairs of its pool.

    Args:
        start, stop: rows of the pool among all pairs, in the order of the packs.
        first: of the pack's first pair in the pool.
    """

    start: int
    stop: int
    first: int


def in_pack_order(samples: Sequence[Sequence[int]]) -> list[int]:
    """Return the order that turns pairs gathered rank by rank into pairs pack by pack; the
    data-parallel ranks take the packs of a step in turn.

    Args:
        samples: pairs of each pack of each data-parallel rank; all have as many packs.
    """
    starts = [0, *accumulate(sum(of_rank) for of_rank in samples)]
    order: list[int] = []
    for number in range(len(samples[0])):
        for rank, of_rank in enumerate(samples):
            first = starts[rank] + sum(of_rank[:number])
            order += range(first, first + of_rank[number])
    return order


def pools_of_rank(samples: Sequence[Sequence[int]], rank: int, packs: int) -> list[PoolOfPack]:
    """Return the pool of each pack of a rank.

    Args:
        samples: as for ``in_pack_order``.
        rank: the data-parallel rank.
        packs: neighbouring packs that make a pool; 0: all.
    """
    counts = [of_rank[number] for number in range(len(samples[0])) for of_rank in samples]
    starts = [0, *accumulate(counts)]
    size = packs or len(counts)
    found = []
    for pack in range(rank, len(counts), len(samples)):
        first = pack // size * size
        start = starts[first]
        stop = starts[min(first + size, len(counts))]
        found.append(PoolOfPack(start=start, stop=stop, first=starts[pack] - start))
    return found
