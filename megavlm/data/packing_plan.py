"""Which samples go into which pack of a dataset, from the sizes of all its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.data.meta import Annotations
from megavlm.data.mixture import take
from megavlm.data.packing import automatic_tile_cap, pack
from megavlm.data.packing_order import places_by_cost
from megavlm.data.rows import Rows

# A shard is large enough to be read at speed, and small enough that little is lost when a packing is stopped; there are never very many.
LEAST_PACKS_PER_SHARD = 64
MOST_SHARDS = 16384


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which samples go into which pack, and which packs into which shard.

    Args:
        order: int32, rows of the survey, pack after pack; a record that is taken k times is there k times.
        starts: int64 [packs + 1]; pack b holds ``order[starts[b]:starts[b + 1]]``.
        tile_cap: most tiles of a pack.
    """

    order: np.ndarray
    starts: np.ndarray
    tile_cap: int

    @property
    def packs(self) -> int:
        """Number of packs."""
        return len(self.starts) - 1

    @property
    def packs_per_shard(self) -> int:
        """Packs of each shard but the last, which may have fewer."""
        return max(LEAST_PACKS_PER_SHARD, -(-self.packs // MOST_SHARDS))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.packs // self.packs_per_shard)

    def shard(self, number: int) -> np.ndarray:
        """Where the packs of a shard start, and where the last ends; part of ``starts``."""
        first = number * self.packs_per_shard
        return self.starts[first : min(first + self.packs_per_shard, self.packs) + 1]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The sizes of all samples, repeats counted.

    Args:
        rows: int32 [samples], the row of the survey that each is, in an order that the seed fixes.
        tokens: int32 [samples], rounded up to the alignment.
        tiles: int32 [samples].
    """

    rows: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray


def gather_samples(rows: Rows, sources: Sequence[Annotations], alignment: int, seed: int) -> Samples:
    """The sizes of the samples that the rows of a survey stand for.

    Args:
        rows: of the survey.
        sources: of the records, and how often they are taken.
        alignment: of samples in a pack.
        seed: fixes which of equal samples share a pack, and which are drawn once more.
    """
    chosen = np.arange(len(rows), dtype=np.int32)
    if any(source.weight is not None or source.repeat_time > 1 for source in sources):
        chosen = take(rows["source"], sources, seed)
    # Best fit takes equally long samples as they come: shuffled, so that neighbours in a file do not share a pack.
    np.random.default_rng((seed, 0)).shuffle(chosen)
    tokens = rows["tokens"][chosen]
    if alignment > 1:
        tokens = -(-tokens // alignment) * alignment
    return Samples(rows=chosen, tokens=tokens, tiles=rows["tiles"][chosen])


def plan_packs(samples: Samples, *, capacity: int, tile_cap: int | None, seed: int) -> PackPlan:
    """Plan the packs over all samples, those of like cost beside each other.

    Args:
        samples: their sizes.
        capacity: most tokens of a pack.
        tile_cap: most tiles of a pack; None: chosen from the data.
        seed: fixes the order of the samples in a pack, and of packs of equal cost.
    """
    tokens, tiles = samples.tokens, samples.tiles
    cap = automatic_tile_cap(tokens, tiles, capacity, seed=seed) if tile_cap is None else tile_cap
    packing = pack(tokens, tiles, capacity=capacity, tile_cap=cap)
    squares = np.bincount(packing.bin_of, weights=np.square(tokens, dtype=np.float64), minlength=packing.bins)
    places = places_by_cost(squares, np.bincount(packing.bin_of, weights=tiles, minlength=packing.bins))
    order, starts = packing.members(seed, places)
    return PackPlan(order=samples.rows[order], starts=starts, tile_cap=cap)
