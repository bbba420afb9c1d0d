"""The order of the packs, as a pure function: which pack stands at a position of the endless
sequence of epochs.

Nothing is stored and nothing is shuffled in memory, so resuming at any position, with any number of
ranks, costs the same.

An epoch's order is a permutation of ``range(num_packs)`` made by a Feistel network over the next
power of two, walking along its cycles until a number falls inside the range (J. Black and P.
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

Packs are stored so that neighbours cost alike (see ``megavlm/data/packing/cost_order.py``). With a
``group`` of several packs, each run of so many positions is taken from one neighbourhood, a window
of a few groups; groups come in a random order, and windows start elsewhere in every epoch.

Packs that cost alike hold samples of like kinds, so a step of few groups would be a sample of few
kinds. With several ``strata`` the packs in the order of their cost are cut into as many equal
parts, and as many groups that follow each other come from one part each (stratified sampling): the
first half goes up in cost, the second half down. A step that they make up is mixed as all packs
are, and what ranks compute at the same time still costs alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROUNDS = 8
# Below this many bits a Feistel network can make few different permutations; small datasets walk a
# little more instead.
SMALLEST_DOMAIN_BITS = 6
# Permutations of up to so many packs are kept as tables, for single positions.
LARGEST_TABLE = 1024
# A group's packs are drawn from a window of so many groups: enough that every epoch puts other
# packs together.
WINDOW_GROUPS = 8


class Order(ABC):
    """An endless order of packs: of one dataset or of several, with a curriculum or without. A pure
    function of the position.
    """

    num_packs: int
    """Packs that it orders."""

    @abstractmethod
    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the pack at each position of the endless sequence; int64, shaped like
        ``positions``.
        """

    def pack_ids(self, consumed: int, count: int) -> np.ndarray:
        """Return the ``count`` packs that follow the first ``consumed`` ones; int64 [count]. Rank r
        of n data ranks takes ``[r::n]``.
        """
        return self.at(np.arange(consumed, consumed + count, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Plan(Order):
    """The order of the packs of one dataset.

    Args:
        num_packs: packs in the dataset.
        seed: fixes the order of every epoch.
        shuffle: whether epochs are permuted; otherwise packs come as stored.
        group: positions ``[k * group, (k + 1) * group)`` hold packs of similar cost; a step's packs
            are one or several groups. 1: any packs. A part of a group where an epoch ends and the
            next begins is exempt.
        strata: groups that follow each other and come from all over the range of cost; what lies
            outside whole cycles of them where an epoch ends and the next begins is mixed, and in no
            groups. 1: each group comes from anywhere.
        start: position at which the first epoch begins.
    """

    num_packs: int
    seed: int = 0
    shuffle: bool = True
    group: int = 1
    strata: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.num_packs < 1:
            raise ValueError(f"a dataset of {self.num_packs} packs has no order")
        if self.group < 1:
            raise ValueError(f"--data.group {self.group}: must be at least 1")
        if self.strata < 1:
            raise ValueError(f"--data.strata {self.strata}: must be at least 1")

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See ``Order.at``."""
        epochs, offsets = np.divmod(
            np.ravel(positions).astype(np.int64) - self.start, self.num_packs
        )
        if not self.shuffle:
            ids = offsets
        elif self.group == self.strata == 1:
            ids = permute(offsets, self.num_packs, self.seed, epochs)
        else:
            ids = self._grouped(offsets, epochs)
        return ids.reshape(np.shape(positions))

    def _grouped(self, offsets: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the pack at each position of its epoch, with cost buckets kept together."""
        cycle = self.group * self.strata
        lead = -(self.start + epochs * self.num_packs) % cycle  # an epoch begins inside a cycle
        groups = (self.num_packs - lead) // cycle * self.strata
        if self.strata > 1:
            groups = np.maximum(groups, 0)
        within = offsets - lead
        outside = (within < 0) | (within >= groups * self.group)
        rest = np.where(within < 0, offsets, lead + within - groups * self.group)
        for count in np.unique(groups[~outside]).tolist():
            chosen = (groups == count) & ~outside
            within[chosen] = self._place_groups(within[chosen], count, epochs[chosen])
        if self.strata == 1:
            # What lies outside whole groups comes last in the order that is cut into groups.
            sorted_offsets = np.where(outside, groups * self.group + rest, within)
            largest = self.num_packs
        else:
            rest[outside] = self._shuffle_rest(rest[outside], groups[outside], epochs[outside])
            sorted_offsets = self._spread_rest(np.where(outside, rest, within), groups, outside)
            # A stratum that is moved beyond the end would be of the cheapest packs and the dearest.
            largest = self.num_packs // (self.strata * WINDOW_GROUPS)
            largest = max(1, min(largest, WINDOW_GROUPS * self.group))
        shift = _mix(np.uint64(self.seed % 2**64) + _mix(epochs.astype(np.uint64))) % np.uint64(
            largest
        )
        return (sorted_offsets + shift.astype(np.int64)) % self.num_packs

    def _spread_rest(
        self, places: np.ndarray, groups: np.ndarray, outside: np.ndarray
    ) -> np.ndarray:
        """Return the places in the stored order of what lies in whole cycles and ``outside``: the
        latter is evenly spread, so that the steps which it makes up are mixed too.
        """
        inside = groups * self.group
        others = np.maximum(self.num_packs - inside, 1)
        # The numbers of two complementary Beatty sequences.
        return np.where(
            outside,
            places * self.num_packs // others,
            -(-(places + 1) * self.num_packs // np.maximum(inside, 1)) - 1,
        )

    def _shuffle_rest(self, rest: np.ndarray, groups: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Permute what lies outside whole cycles of each epoch."""
        shuffled = np.empty_like(rest)
        for count in np.unique(groups).tolist():
            chosen = groups == count
            size = self.num_packs - count * self.group
            shuffled[chosen] = permute(rest[chosen], size, self.seed, epochs[chosen])
        return shuffled

    def _place_groups(self, within: np.ndarray, count: int, epochs: np.ndarray) -> np.ndarray:
        """Permute ``count`` groups, and the offsets inside each window of groups of a stratum."""
        places, strata = np.divmod(within // self.group, self.strata)
        size = count // self.strata
        keys = epochs
        if self.strata > 1:
            # A rank that has packs at several places would have the dearer ones of all, so the
            # second half of a cycle goes down in cost where the first goes up.
            half = self.strata // 2
            strata = np.where(strata < half, strata, self.strata - 1 - strata + half)
            keys = _keys(epochs, strata + 2**62)
        groups = permute(places, size, self.seed, keys)
        first = strata * size
        if self.group == 1:
            return first + groups
        windows, rest = np.divmod(groups, WINDOW_GROUPS)
        offsets = rest * self.group + within % self.group
        keys = _keys(epochs, strata * 2**32 + windows)
        sizes = np.minimum(size - windows * WINDOW_GROUPS, WINDOW_GROUPS) * self.group
        for size in np.unique(sizes).tolist():
            chosen = sizes == size
            offsets[chosen] = permute(offsets[chosen], size, self.seed, keys[chosen])
        return (first + windows * WINDOW_GROUPS) * self.group + offsets


def _keys(epochs: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return a number for each epoch and part, which stands for an epoch of the part's own."""
    return _mix(epochs.astype(np.uint64) + _mix(parts.astype(np.uint64))).astype(np.int64)


def permute(offsets: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return where each offset of ``range(size)`` goes in the permutation of (seed, its epoch);
    all are int64 [n].
    """
    # Many positions may lie in many epochs, each with a table of its own.
    if len(offsets) != 1 or size > LARGEST_TABLE:
        return _permute(offsets, size, seed, epochs)
    return _table(size, seed, int(epochs[0]))[offsets]


@lru_cache(maxsize=256)
def _table(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a whole permutation of few packs, of which single ones are asked for again and
    again.
    """
    offsets = np.arange(size, dtype=np.int64)
    return _permute(offsets, size, seed, np.full_like(offsets, epoch))


def _permute(offsets: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    bits = max(SMALLEST_DOMAIN_BITS, (size - 1).bit_length())
    # A modulo rather than a cast, so that a negative seed is a seed too.
    key = _mix(np.uint64(seed % 2**64) ^ _mix(epochs.astype(np.uint64)))
    values = _feistel(offsets.astype(np.uint64), key, bits)
    outside = values >= np.uint64(size)
    while outside.any():
        values[outside] = _feistel(values[outside], key[outside], bits)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """One pass of the network, a permutation of ``range(2**bits)`` for each key: the two halves
    change in turn, each by the other.
    """
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    low = values & low_mask
    high = values >> np.uint64(low_bits)
    for turn in range(ROUNDS):
        turn_key = key + np.uint64(turn * 0x9E3779B97F4A7C15 % 2**64)
        if turn % 2:
            high = high ^ (_mix(low ^ turn_key) & high_mask)
        else:
            low = low ^ (_mix(high ^ turn_key) & low_mask)
    return high << np.uint64(low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (G. Steele et al., "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014); wraps at 64 bits.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
