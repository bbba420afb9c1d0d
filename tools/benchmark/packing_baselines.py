"""Other rules of packing, to compare ours with: how a dataset would be packed elsewhere.

The rules are plain loops; where numba is installed they run as machine code, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megavlm.data.load_imbalance import expected_peak
from megavlm.data.packing.best_fit import Packing, automatic_tile_cap, pack

INTERNVL_BUFFERS = 20
INTERNVL_TILES = 48


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What one rule of packing comes to.

    Args:
        name: of the rule.
        packs: number of packs.
        fill: share of the packs' capacity that holds tokens.
        imbalance_512: load imbalance in tiles of 512 random packs: how long 512 data-parallel ranks
            wait for the vision encoder of the slowest.
        tile_cap: most tiles of a pack; None: any number.
        samples_per_s: samples packed a second of one processor; choosing the cap is counted.
    """

    name: str
    packs: int
    fill: float
    imbalance_512: float
    tile_cap: int | None
    samples_per_s: float


def compare(
    tokens: np.ndarray,
    tiles: np.ndarray,
    capacity: int,
    *,
    tile_cap: int | None = None,
    seed: int = 0,
) -> tuple[Strategy, ...]:
    """Pack the samples by every rule.

    ``next_fit`` closes a pack as soon as a sample does not fit, as ms-swift's sequential packing
    does. ``internvl_buffers`` keeps InternVL's 20 open packs of at most 48 tiles; a sample of more
    tiles, which InternVL drops, gets a pack of its own. ``best_fit`` is best fit decreasing over
    the tokens alone. ``global_best_fit`` is ours.

    Args:
        tokens: int [samples], aligned.
        tiles: int [samples].
        capacity: most tokens of a pack.
        tile_cap: most tiles of our packs; None: chosen from the data.
        seed: of the choice of the cap.
    """
    tokens = np.asarray(tokens, np.int32)
    tiles = np.asarray(tiles, np.int32)
    loops = _loops()

    def ours() -> tuple[Packing, int]:
        cap = (
            automatic_tile_cap(tokens, tiles, capacity, seed=seed) if tile_cap is None else tile_cap
        )
        return pack(tokens, tiles, capacity=capacity, tile_cap=cap), cap

    def buffered() -> tuple[Packing, int]:
        return (
            _packing(loops["buffered"](tokens, tiles, capacity, INTERNVL_TILES, INTERNVL_BUFFERS)),
            INTERNVL_TILES,
        )

    rules: dict[str, Callable[[], tuple[Packing, int | None]]] = {
        "next_fit": lambda: (_packing(loops["next_fit"](tokens, capacity)), None),
        "internvl_buffers": buffered,
        "best_fit": lambda: (
            pack(tokens, np.zeros_like(tiles), capacity=capacity, tile_cap=0),
            None,
        ),
        "global_best_fit": ours,
    }
    return tuple(_measure(name, rule, tokens, tiles, capacity) for name, rule in rules.items())


def next_fit(tokens: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign samples to bins in the order given, with only the last bin open; return each sample's
    bin and the number of bins.
    """
    bin_of = np.empty(len(tokens), np.int32)
    bins = 0
    left = 0
    for sample in range(len(tokens)):
        if tokens[sample] > left:
            bins = bins + 1
            left = capacity
        left -= tokens[sample]
        bin_of[sample] = bins - 1
    return bin_of, bins


def buffered(
    tokens: np.ndarray, tiles: np.ndarray, capacity: int, most_tiles: int, buffers: int
) -> tuple[np.ndarray, int]:
    """First fit over a few open bins, those with most tiles first, as in InternVL's
    ``PackedDataset``.

    A bin is closed when its tokens or its tiles are all used, or when there are more than
    ``buffers`` of them: then the one with most tiles.
    """
    bin_of = np.empty(len(tokens), np.int32)
    held = np.zeros(
        (buffers + 1, 3), np.int64
    )  # bin, tokens, tiles of each open bin; most tiles first
    count = 0
    bins = 0
    for sample in range(len(tokens)):
        index = 0
        while index < count and (
            held[index, 1] + tokens[sample] > capacity
            or held[index, 2] + tiles[sample] > most_tiles
        ):
            index += 1
        if index < count:
            chosen = held[index, 0]
            used = held[index, 1] + tokens[sample]
            used_tiles = held[index, 2] + tiles[sample]
            for later in range(index, count - 1):
                held[later] = held[later + 1]
            count -= 1
        else:
            chosen = bins
            used = np.int64(tokens[sample])
            used_tiles = np.int64(tiles[sample])
            bins += 1
        bin_of[sample] = chosen
        if used == capacity or used_tiles >= most_tiles:
            continue
        index = count
        while index > 0 and held[index - 1, 2] < used_tiles:
            held[index] = held[index - 1]
            index -= 1
        held[index, 0] = chosen
        held[index, 1] = used
        held[index, 2] = used_tiles
        count += 1
        if count > buffers:
            count -= 1
            for later in range(count):
                held[later] = held[later + 1]
    return bin_of, bins


def _loops() -> dict[str, Callable[..., tuple[np.ndarray, int]]]:
    """Return the loops of this module, compiled if numba is installed."""
    try:
        from megavlm.io.compile import compiled
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return {"next_fit": next_fit, "buffered": buffered}
    return {"next_fit": compiled(next_fit), "buffered": compiled(buffered)}


def _packing(found: tuple[np.ndarray, int]) -> Packing:
    """Convert a rule's answer to a packing."""
    return Packing(bin_of=found[0], bins=int(found[1]))


def _measure(
    name: str,
    rule: Callable[[], tuple[Packing, int | None]],
    tokens: np.ndarray,
    tiles: np.ndarray,
    capacity: int,
) -> Strategy:
    """Run a rule and weigh its packs."""
    start = time.process_time()
    packing, cap = rule()
    seconds = time.process_time() - start
    work = np.bincount(packing.bin_of, weights=tiles, minlength=packing.bins)
    return Strategy(
        name=name,
        packs=packing.bins,
        fill=int(tokens.sum(dtype=np.int64)) / (packing.bins * capacity),
        imbalance_512=expected_peak(work) - 1.0,
        tile_cap=cap,
        samples_per_s=len(tokens) / seconds,
    )
