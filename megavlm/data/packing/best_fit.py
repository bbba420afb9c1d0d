"""Which samples share a pack: best fit over all samples, in two dimensions (tokens and tiles).

Samples are placed longest first (best fit decreasing), each into the open pack that it leaves least
room in: the sum of the shares of tokens and of tiles that stay free. Open packs are kept by their
free tiles and free tokens, one set of bits over the free tokens for each number of free tiles, so
the best one is found without looking at the packs one by one. If packs have thousands of tiles, as
those of images of any size, a few numbers of free tiles that follow each other share a set: what
is looked at is the least of them, so no pack gets more than fits, and none is found for a sample
that would fit by a few tiles alone.

The tile cap is what makes the second dimension worth it: a pack with the mean number of tiles is a
full share of the vision encoder's work, so a cap just above the mean keeps all ranks busy alike,
and with best fit it hardly costs tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# What the automatic cap tries, as multiples of the mean tiles of a full pack.
CAP_FACTORS = (1.01, 1.02, 1.03, 1.04, 1.06, 1.08, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)
# Caps below the mean cannot fill the packs; the curve shows what they would cost.
LOW_CAP_FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0)
GOOD_FILL = 0.999
# Caps are tried on this many samples; more do not change which cap is found, only how long it
# takes.
TRIAL_SAMPLES = 100_000
# Numbers of free tokens times sets of numbers of free tiles, each with a pack in 4 bytes: sets get
# so large that it is a quarter of a GiB, but no larger than leaves FEWEST_SETS of them; 16 GiB at
# most.
USUAL_STATES = 2**26
MOST_STATES = 2**32
FEWEST_SETS = 256


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which pack each sample is in.

    Args:
        bin_of: int32 [samples], the pack of each sample.
        bins: number of packs.
    """

    bin_of: np.ndarray
    bins: int

    def members(self, seed: int, pack_of_bin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Order the samples by pack and find where each pack starts: pack b holds
        ``order[starts[b]:starts[b + 1]]``.

        Args:
            seed: samples inside a pack come in a random order that it fixes; otherwise the longest
                would always be first.
            pack_of_bin: int [bins], which pack each bin becomes.
        """
        bin_of = pack_of_bin.astype(np.int32)[self.bin_of]
        samples = np.arange(len(bin_of), dtype=np.int32)
        np.random.default_rng(seed).shuffle(samples)
        order = samples[np.argsort(bin_of[samples], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=self.bins))])
        return order, starts


def pack(tokens: np.ndarray, tiles: np.ndarray, *, capacity: int, tile_cap: int) -> Packing:
    """Put samples into as few packs as best fit finds. Runs as machine code where numba is
    installed; the result is the same without.

    Args:
        tokens: int [samples], tokens of each sample, rounded up to the alignment of samples in a
            pack.
        tiles: int [samples], tiles of each sample.
        capacity: most tokens of a pack.
        tile_cap: most tiles of a pack.

    Raises:
        ValueError: a sample that is empty, longer than the capacity, or of more tiles than the cap.
    """
    tokens = np.asarray(tokens, np.int32)
    tiles = np.asarray(tiles, np.int32)
    check_sizes(tokens, tiles, capacity, tile_cap)
    unit = tiles_of_set(capacity, tile_cap)
    if (tile_cap // unit + 1) * (capacity + 1) > MOST_STATES:
        raise ValueError(
            f"--capacity {capacity} with up to {tile_cap} tiles (--tile_cap): a table of"
            f" {4e-9 * (tile_cap // unit) * capacity:.3g} GB to find places in packs; lower one of"
            " the two"
        )
    if len(tokens) == 0:
        return Packing(bin_of=np.zeros(0, np.int32), bins=0)
    # Unsigned 16-bit keys are sorted by radix, several times as fast.
    keys = (capacity - tokens).astype(np.uint16 if capacity <= 2**16 else np.int32)
    order = np.argsort(keys, kind="stable")
    try:
        from megavlm.data.packing.best_fit_numba import best_fit
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        best_fit = best_fit_python
    bin_of, bins = best_fit(tokens, tiles, order, capacity, tile_cap, unit)
    return Packing(bin_of=bin_of, bins=int(bins))


def tiles_of_set(capacity: int, tile_cap: int) -> int:
    """Return how many numbers of free tiles share a set."""
    if tile_cap >= 2**31:  # more than any pack has; scores would not fit into 64 bits
        return 1
    states = (tile_cap + 1) * (capacity + 1)
    return max(1, min(-(-states // USUAL_STATES), tile_cap // FEWEST_SETS))


@dataclass(frozen=True, kw_only=True)
class CapTrial:
    """What a tile cap comes to: the fill of packs of a random part of the samples, against the
    fewest packs that could hold their tokens.
    """

    tile_cap: int
    fill: float


def automatic_tile_cap(
    tokens: np.ndarray,
    tiles: np.ndarray,
    capacity: int,
    *,
    seed: int = 0,
    multiple: int = 1,
) -> int:
    """Choose the lowest tile cap that wastes hardly any tokens, by packing a random part of the
    samples with several caps.

    Tried are 1.01, 1.02, 1.03, ... times the mean tiles of a full pack, never below the tiles of
    the largest sample, and at last a cap that cannot bind. Taken is the lowest whose fill is
    ``GOOD_FILL`` or more, measured against the fewest packs that could hold the tokens, so that a
    small set is not blamed for its last pack. Where none is, it is the lowest of those with the
    best fill. All are rounded up to a ``multiple``, where a pack's tiles will be filled up to it
    anyway.

    Raises:
        ValueError: a sample that is empty or longer than the capacity.
    """
    trials = []
    for trial in _try_caps(tokens, tiles, capacity, seed, multiple=multiple):
        trials.append(trial)
        if trial.fill >= GOOD_FILL:
            return trial.tile_cap
    return max(trials, key=lambda trial: trial.fill).tile_cap if trials else 0


def cap_curve(
    tokens: np.ndarray,
    tiles: np.ndarray,
    capacity: int,
    *,
    seed: int = 0,
    also: int = 0,
    multiple: int = 1,
) -> tuple[CapTrial, ...]:
    """Measure the fill with each cap that ``automatic_tile_cap`` may choose, with some lower ones,
    and with the cap ``also``.
    """
    return tuple(
        _try_caps(tokens, tiles, capacity, seed, (*LOW_CAP_FACTORS, *CAP_FACTORS), also, multiple)
    )


def _try_caps(
    tokens: np.ndarray,
    tiles: np.ndarray,
    capacity: int,
    seed: int,
    factors: Sequence[float] = CAP_FACTORS,
    also: int = 0,
    multiple: int = 1,
) -> Iterator[CapTrial]:
    """Pack with each cap to try, lowest first; yield nothing if there are no tiles."""
    tokens = np.asarray(tokens, np.int32)
    tiles = np.asarray(tiles, np.int32)
    most = int(tiles.max(initial=0))
    check_sizes(tokens, tiles, capacity, most)
    if most == 0:
        return
    if len(tokens) > TRIAL_SAMPLES:
        chosen = np.random.default_rng(seed).choice(len(tokens), TRIAL_SAMPLES, replace=False)
        tokens = tokens[chosen]
        tiles = tiles[chosen]
    total = int(tokens.sum(dtype=np.int64))
    mean = int(tiles.sum(dtype=np.int64)) * capacity / total
    # No pack can hold more: its tokens times the densest sample's tiles a token.
    unbound = max(
        most, min(int(capacity * float((tiles / tokens).max())), int(tiles.sum(dtype=np.int64)))
    )
    wanted = {min(max(math.ceil(factor * mean), most), unbound) for factor in factors} | {unbound}
    caps = {-(-cap // multiple) * multiple for cap in wanted}
    fewest = math.ceil(total / capacity)
    for cap in sorted(caps | ({also} if also >= most else set())):
        yield CapTrial(
            tile_cap=cap, fill=fewest / pack(tokens, tiles, capacity=capacity, tile_cap=cap).bins
        )


def check_sizes(tokens: np.ndarray, tiles: np.ndarray, capacity: int, tile_cap: int) -> None:
    """Raise ValueError for a sample that no pack can hold."""
    if tokens.shape != tiles.shape or tokens.ndim != 1:
        raise ValueError(
            f"token counts of shape {tokens.shape} and tile counts of shape {tiles.shape} must be"
            " one list of the same samples"
        )
    rules = (
        (tokens < 1, "has no tokens", tokens),
        (tokens > capacity, f"has more tokens than --capacity {capacity}", tokens),
        (tiles < 0, "has a negative number of tiles", tiles),
        (tiles > tile_cap, f"has more tiles than --tile_cap {tile_cap}", tiles),
    )
    for wrong, what, values in rules:
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"sample {first} {what}: {values[first]}; {np.count_nonzero(wrong)} of"
                f" {len(tokens)} samples do"
            )


def best_fit_python(
    tokens: np.ndarray,
    tiles: np.ndarray,
    order: np.ndarray,
    capacity: int,
    tile_cap: int,
    unit: int,
) -> tuple[np.ndarray, int]:
    """``best_fit_numba.best_fit`` in plain Python, with whole numbers of any size as sets of bits.
    The result is the same, bin for bin.
    """
    # For each set of free tiles: bit t is set where a bin with t free tokens is open.
    free = [0] * (tile_cap // unit + 1)
    open_bins: dict[tuple[int, int], list[int]] = {}
    free_tiles: list[int] = []
    bin_of = np.empty(len(tokens), np.int32)
    bins = 0
    tile_scale = max(tile_cap, 1)
    for sample in order.tolist():
        need = int(tokens[sample])
        need_tiles = int(tiles[sample])
        best_row = -1
        best_left = 0
        best_score = 2**62
        for row in range(-(-need_tiles // unit), len(free)):
            spare = (row * unit - need_tiles) * capacity
            if spare >= best_score:
                break
            fitting = free[row] >> need
            if fitting:
                unused = (fitting & -fitting).bit_length() - 1
                if unused * tile_scale + spare < best_score:
                    best_row = row
                    best_left = need + unused
                    best_score = unused * tile_scale + spare
        if best_row < 0:
            chosen = bins
            free_tiles.append(tile_cap)
            best_left = capacity
            bins += 1
        else:
            stack = open_bins[best_row, best_left]
            chosen = stack.pop()
            if not stack:
                free[best_row] ^= 1 << best_left
        free_tiles[chosen] -= need_tiles
        row = free_tiles[chosen] // unit
        left = best_left - need
        open_bins.setdefault((row, left), []).append(chosen)
        free[row] |= 1 << left
        bin_of[sample] = chosen
    return bin_of, bins
