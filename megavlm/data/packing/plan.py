"""Which samples go into which pack of a dataset, from the sizes of all its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megavlm.data.packing.best_fit import automatic_tile_cap, pack
from megavlm.data.packing.cost_order import storage_order
from megavlm.data.packing.difficulty import Levels, find_levels
from megavlm.data.packing.neighbours import fill_in_order, places_in_turns, places_of
from megavlm.data.packing.repeats import take
from megavlm.data.records.meta_file import Annotations
from megavlm.data.store.manifest import Level
from megavlm.io.record_file import RecordFile

# A shard is large enough to be read at speed, and small enough that little is lost when a packing
# is stopped; there are never very many.
LEAST_PACKS_PER_SHARD = 64
MOST_SHARDS = 16384


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which samples go into which pack, and which packs into which shard.

    Args:
        order: int32, rows of the scan, pack after pack; a record that is taken k times is there k
            times.
        starts: int64 [packs + 1]; pack b holds ``order[starts[b]:starts[b + 1]]``.
        tile_cap: most tiles of a pack.
        levels: of difficulty, one after the other; none where it is not known.
    """

    order: np.ndarray
    starts: np.ndarray
    tile_cap: int
    levels: tuple[Level, ...] = ()

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

    def levels_without(self, lost_packs: Sequence[int]) -> tuple[Level, ...]:
        """Return the levels of difficulty after leaving out packs that could not be written."""
        ends = np.cumsum([level.packs for level in self.levels])
        lost = (
            np.bincount(np.searchsorted(ends, lost_packs, side="right"), minlength=len(ends))
            if self.levels
            else ()
        )
        left = (
            replace(level, packs=level.packs - int(count))
            for level, count in zip(self.levels, lost, strict=True)
        )
        return tuple(level for level in left if level.packs)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The sizes of all samples, repeats counted; a sample and the rejected one beside it are one
    here, since they share a pack.

    Args:
        rows: int32 [samples], the row of the scan that each is, in an order that the seed fixes.
        tokens: int32 [samples], rounded up to the alignment.
        tiles: int32 [samples].
        levels: of difficulty, where it is known.
        places: in whose order packs are filled, int64 [samples]; none: as they fit best.
    """

    rows: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    levels: Levels | None = None
    places: np.ndarray | None = None


def gather_samples(
    rows: RecordFile,
    sources: Sequence[Annotations],
    alignment: int,
    seed: int,
    levels: int = 0,
    near: str = "",
) -> Samples:
    """Compute the sizes of the samples to pack from the rows of a scan.

    Args:
        rows: of the scan.
        sources: of the records, and how often they are taken.
        alignment: of samples in a pack.
        seed: fixes which of equal samples share a pack, and which are drawn once more.
        levels: of difficulty, as for ``find_levels``.
        near: folder of scores with the records' places; empty: places do not matter.
    """
    chosen = np.arange(len(rows), dtype=np.int32)
    if any(source.weight is not None or source.repeat_time > 1 for source in sources):
        chosen = take(rows["source"], sources, seed)
    # Best fit takes equally long samples as they come: shuffled, so that neighbours in a file do
    # not share a pack.
    np.random.default_rng((seed, 0)).shuffle(chosen)
    tokens = rows["tokens"][chosen]
    if alignment > 1:
        tokens = -(-tokens // alignment) * alignment
    is_known = any(source.difficulty is not None for source in sources)
    found = find_levels(rows["difficulty"][chosen], levels) if is_known else None
    places = None
    if near:
        places = places_of(rows["source"][chosen], rows["line"][chosen], sources, near)
        places = places_in_turns(places, chosen)
    return Samples(
        rows=chosen,
        tokens=tokens,
        tiles=rows["tiles"][chosen],
        levels=found,
        places=places,
    )


def plan_packs(
    samples: Samples, *, capacity: int, tile_cap: int | None, seed: int, tile_multiple: int = 1
) -> PackPlan:
    """Plan the packs over all samples, similar costs beside each other. A pack has samples of
    one level of difficulty.

    Args:
        samples: their sizes.
        capacity: most tokens of a pack.
        tile_cap: most tiles of a pack; None: chosen from the data, for each level.
        seed: fixes the order of the samples in a pack, and of packs of equal cost.
        tile_multiple: what the chosen cap is a multiple of.
    """
    if samples.levels is None:
        return _plan_level(samples, capacity, tile_cap, seed, tile_multiple)
    plans = []
    levels = []
    for number, (easiest, hardest) in enumerate(samples.levels.bounds):
        own = samples.levels.of_sample == number
        level = Samples(
            rows=samples.rows[own], tokens=samples.tokens[own], tiles=samples.tiles[own]
        )
        plans.append(_plan_level(level, capacity, tile_cap, seed, tile_multiple))
        levels.append(Level(packs=plans[-1].packs, easiest=easiest, hardest=hardest))
    before = np.cumsum([0] + [len(plan.order) for plan in plans])
    return PackPlan(
        order=np.concatenate([plan.order for plan in plans]),
        starts=np.concatenate(
            [
                [0],
                *(plan.starts[1:] + start for plan, start in zip(plans, before[:-1], strict=True)),
            ]
        ),
        tile_cap=max(plan.tile_cap for plan in plans),
        levels=tuple(levels),
    )


def _plan_level(
    samples: Samples, capacity: int, tile_cap: int | None, seed: int, tile_multiple: int
) -> PackPlan:
    """``plan_packs`` for samples that may share packs."""
    tokens = samples.tokens
    tiles = samples.tiles
    cap = (
        automatic_tile_cap(tokens, tiles, capacity, seed=seed, multiple=tile_multiple)
        if tile_cap is None
        else tile_cap
    )
    if samples.places is None:
        packing = pack(tokens, tiles, capacity=capacity, tile_cap=cap)
    else:
        packing = fill_in_order(tokens, tiles, samples.places, capacity=capacity, tile_cap=cap)
    squares = np.bincount(
        packing.bin_of, weights=np.square(tokens, dtype=np.float64), minlength=packing.bins
    )
    pack_of_bin = storage_order(
        squares, np.bincount(packing.bin_of, weights=tiles, minlength=packing.bins)
    )
    order, starts = packing.members(seed, pack_of_bin)
    return PackPlan(order=samples.rows[order], starts=starts, tile_cap=cap)
