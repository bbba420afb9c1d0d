"""The order of the packs, as a pure function: which pack stands at a position of the endless sequence of epochs.

Nothing is stored and nothing is shuffled in memory, so resuming at any position, with any number of ranks, costs the same.

An epoch's order is a permutation of ``range(num_packs)`` made by a Feistel network over the next power of two, walking along its cycles
until a number falls inside the range (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDS = 8
# Below this many bits a Feistel network can make few different permutations; small datasets walk a little more instead.
SMALLEST_DOMAIN_BITS = 6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of the packs of one dataset.

    Args:
        num_packs: packs in the dataset.
        seed: fixes the order of every epoch.
        shuffle: whether epochs are permuted; otherwise packs come as stored.
    """

    num_packs: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_packs < 1:
            raise ValueError(f"a dataset of {self.num_packs} packs has no order")

    def pack_ids(self, consumed: int, count: int) -> np.ndarray:
        """Ids of the ``count`` packs that follow the first ``consumed`` ones; int64 [count]. Rank r of n data ranks takes ``[r::n]``."""
        return self.at(np.arange(consumed, consumed + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The pack at each position of the endless sequence; int64, shaped like ``positions``."""
        epochs, places = np.divmod(np.ravel(positions).astype(np.int64), self.num_packs)
        ids = permute(places, self.num_packs, self.seed, epochs) if self.shuffle else places
        return ids.reshape(np.shape(positions))


def permute(places: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each place of ``range(size)`` goes in the permutation of (seed, its epoch); all of them are int64 [n]."""
    bits = max(SMALLEST_DOMAIN_BITS, (size - 1).bit_length())
    # A modulo rather than a cast, so that a negative seed is a seed too.
    key = _mix(np.uint64(seed % 2**64) ^ _mix(epochs.astype(np.uint64)))
    values = _feistel(places.astype(np.uint64), key, bits)
    outside = values >= np.uint64(size)
    while outside.any():
        values[outside] = _feistel(values[outside], key[outside], bits)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """One pass of the network, a permutation of ``range(2**bits)`` for each key: the two halves change in turn, each by the other."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for turn in range(ROUNDS):
        turn_key = key + np.uint64(turn * 0x9E3779B97F4A7C15 % 2**64)
        if turn % 2:
            high = high ^ (_mix(low ^ turn_key) & high_mask)
        else:
            low = low ^ (_mix(high ^ turn_key) & low_mask)
    return high << np.uint64(low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (G. Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014); wraps at 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
