"""Packing respects both limits, loses no sample, fills packs, and does not depend on numba."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from megavlm.data.packing import best_fit, plan
from megavlm.data.packing.best_fit import (
    Packing,
    automatic_tile_cap,
    best_fit_python,
    cap_curve,
    pack,
)
from megavlm.data.packing.cost_order import storage_order

CAPACITY = 16384


def mixture(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of images of 1 to 13 tiles, several images, videos and text; 256 tokens a
    tile.
    """
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, count, p=[0.62, 0.13, 0.20, 0.05])
    tiles = np.select(
        [kind == 0, kind == 1, kind == 3],
        [rng.integers(1, 14, count), rng.integers(2, 21, count), rng.integers(8, 33, count)],
        0,
    )
    text = np.clip(rng.lognormal(5.2, 1.0, count), 16, 8000).astype(np.int64)
    return np.minimum(tiles * 256 + text, CAPACITY), tiles


def check(packing: Packing, tokens: np.ndarray, tiles: np.ndarray, capacity: int, cap: int) -> None:
    assert set(packing.bin_of.tolist()) == set(range(packing.bins))
    assert np.bincount(packing.bin_of, weights=tokens).max() <= capacity
    assert np.bincount(packing.bin_of, weights=tiles).max() <= cap


def test_limits_and_fill():
    tokens, tiles = mixture(50_000)
    cap = automatic_tile_cap(tokens, tiles, CAPACITY)
    packing = pack(tokens, tiles, capacity=CAPACITY, tile_cap=cap)
    check(packing, tokens, tiles, CAPACITY, cap)
    assert tokens.sum() / (packing.bins * CAPACITY) >= 0.999
    mean_tiles = tiles.sum() / packing.bins
    assert cap <= 1.06 * mean_tiles


@pytest.mark.parametrize("case", range(12))
def test_numba_and_python_agree(case):
    compiled = pytest.importorskip(
        "megavlm.data.packing.best_fit_numba", exc_type=ImportError
    ).best_fit
    rng = np.random.default_rng(case)
    capacity = int(rng.choice([7, 63, 64, 65, 128, 4095, 4096, 4097, CAPACITY]))
    unit = int(rng.choice([1, 1, 2, 7]))
    cap = unit * int(rng.integers(0, 20)) + int(rng.integers(0, unit))
    tokens = rng.integers(1, max(2, capacity // int(rng.integers(1, 9))) + 1, 3000).astype(np.int32)
    tiles = np.minimum(rng.integers(0, cap + 1, 3000), cap).astype(np.int32)
    order = np.argsort(-tokens, kind="stable")
    expected, bins = best_fit_python(tokens, tiles, order, capacity, cap, unit)
    found, found_bins = compiled(tokens, tiles, order, capacity, cap, unit)
    assert bins == found_bins
    assert np.array_equal(expected, found)
    check(Packing(bin_of=found, bins=bins), tokens, tiles, capacity, cap)


def test_python_matches_a_scan_of_all_bins():
    """The score, written down plainly: the bin with the least free tokens x cap + free tiles x
    capacity after the sample.
    """
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 60, 400)
    tiles = rng.integers(0, 9, 400)
    capacity = 100
    cap = 12
    order = np.argsort(-tokens, kind="stable")
    bins: list[list[int]] = []
    for sample in order:
        fitting = [each for each in bins if each[0] >= tokens[sample] and each[1] >= tiles[sample]]
        if not fitting:
            bins.append([capacity, cap])
            fitting = [bins[-1]]
        best = min(
            fitting,
            key=lambda each: (
                (each[0] - tokens[sample]) * cap + (each[1] - tiles[sample]) * capacity
            ),
        )
        best[0] -= tokens[sample]
        best[1] -= tiles[sample]
    found, count = best_fit_python(tokens, tiles, order, capacity, cap, 1)
    left = np.stack(
        [capacity - np.bincount(found, weights=tokens), cap - np.bincount(found, weights=tiles)],
        axis=1,
    )
    # Among bins that leave equal room any may be taken, so what is compared is the room, not the
    # numbers of the bins.
    assert count == len(bins)
    assert sorted(map(tuple, left.astype(int).tolist())) == sorted(
        (int(free), int(free_tiles)) for free, free_tiles in bins
    )


def test_packs_of_thousands_of_tiles_are_as_full(monkeypatch):
    """Images of any size, with a token for each tile."""
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    tiles = np.minimum(rng.lognormal(6, 0.9, 6000), 1280).astype(int)
    tokens = tiles + rng.integers(30, 900, len(tiles))
    sizes = dict(capacity=8192, tile_cap=5000)
    assert best_fit.tiles_of_set(**sizes) == 1
    exact = pack(tokens, tiles, **sizes)
    monkeypatch.setattr(best_fit, "USUAL_STATES", 2**20)
    assert best_fit.tiles_of_set(**sizes) == 5000 // 256
    found = pack(tokens, tiles, **sizes)
    check(found, tokens, tiles, 8192, 5000)
    assert found.bins <= 1.002 * exact.bins


def test_long_packs_need_no_large_table():
    assert best_fit.tiles_of_set(16384, 60) == 1
    for capacity, cap in ((32768, 20000), (131072, 80000)):
        unit = best_fit.tiles_of_set(capacity, cap)
        assert (cap // unit + 1) * (capacity + 1) <= 1.01 * best_fit.USUAL_STATES


def test_small_sets():
    assert pack(np.array([], int), np.array([], int), capacity=10, tile_cap=3).bins == 0
    assert pack(np.array([10]), np.array([3]), capacity=10, tile_cap=3).bins == 1
    assert pack(np.array([4, 6, 5, 5]), np.zeros(4, int), capacity=10, tile_cap=0).bins == 2
    assert pack(np.array([4, 6]), np.array([2, 2]), capacity=10, tile_cap=3).bins == 2


@pytest.mark.parametrize(
    ("tokens", "tiles", "message"),
    [
        ([5, 11], [0, 0], "sample 1 has more tokens than --capacity 10: 11; 1 of 2"),
        ([5, 5], [0, 4], "sample 1 has more tiles than --tile_cap 3: 4"),
        ([0, 5], [0, 0], "sample 0 has no tokens"),
        ([5, 5], [0, -1], "negative"),
        ([5, 5], [0], "one list of the same samples"),
    ],
)
def test_impossible_samples(tokens, tiles, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(tokens), np.array(tiles), capacity=10, tile_cap=3)


def test_the_automatic_cap_is_the_multiple_above():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 400, 4000)
    tiles = rng.integers(0, 9, 4000)
    plain = automatic_tile_cap(tokens, tiles, CAPACITY)
    assert plain % 16
    assert [
        automatic_tile_cap(tokens, tiles, CAPACITY, multiple=multiple) for multiple in (4, 16)
    ] == [-(-plain // m) * m for m in (4, 16)]
    assert all(
        trial.tile_cap % 16 == 0 for trial in cap_curve(tokens, tiles, CAPACITY, multiple=16)
    )


def test_automatic_cap_of_other_data():
    assert automatic_tile_cap(np.array([5, 6]), np.array([0, 0]), 10) == 0
    assert automatic_tile_cap(np.array([], int), np.array([], int), 10) == 0
    # One sample far above the mean sets the cap.
    tokens, tiles = mixture(2000)
    tokens[0] = CAPACITY
    tiles[0] = 64
    assert automatic_tile_cap(tokens, tiles, CAPACITY) == 64
    # A cap below the mean tiles of a full pack would need more packs than the tokens do.
    tokens, tiles = mixture(500, seed=1)
    cap = automatic_tile_cap(tokens, tiles, CAPACITY)
    assert (
        pack(tokens, tiles, capacity=CAPACITY, tile_cap=cap).bins
        <= math.ceil(tokens.sum() / CAPACITY) + 1
    )


def test_members():
    tokens, tiles = mixture(500)
    packing = pack(tokens, tiles, capacity=CAPACITY, tile_cap=64)
    places = np.random.default_rng(0).permutation(packing.bins)
    for seed in (0, 1):
        order, starts = packing.members(seed, places)
        assert np.array_equal(np.sort(order), np.arange(500))
        for group, place in enumerate(np.argsort(places)):
            assert set(order[starts[group] : starts[group + 1]]) == set(
                np.flatnonzero(packing.bin_of == place)
            )
    assert not np.array_equal(packing.members(0, places)[0], packing.members(1, places)[0])


def test_storage_order_makes_neighbours_similar():
    rng = np.random.default_rng(0)
    squared = rng.lognormal(17, 1, 6400)
    tiles = rng.integers(30, 57, 6400)
    places = storage_order(squared, tiles)
    assert np.array_equal(np.sort(places), np.arange(6400))
    stored = np.argsort(places).reshape(-1, 64)
    for cost, least in ((squared, 3), (tiles, 6)):
        spread = (cost[stored].max(axis=1) / cost[stored].mean(axis=1) - 1).mean()
        shuffled = (rng.permutation(cost).reshape(-1, 64).max(axis=1) / cost.mean() - 1).mean()
        assert spread * least < shuffled


def test_without_numba(monkeypatch):
    tokens, tiles = mixture(300)
    expected = pack(tokens, tiles, capacity=CAPACITY, tile_cap=64)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "megavlm.data.packing.best_fit_numba", raising=False)
    found = pack(tokens, tiles, capacity=CAPACITY, tile_cap=64)
    assert "megavlm.data.packing.best_fit_numba" not in sys.modules
    assert np.array_equal(found.bin_of, expected.bin_of)


@pytest.mark.parametrize(("packs", "sizes"), [(5, [2, 2, 1]), (10, [4, 4, 2]), (12, [4, 4, 4])])
def test_shards_hold_a_few_packs_at_least_and_are_a_few_at_most(monkeypatch, packs, sizes):
    monkeypatch.setattr(plan, "LEAST_PACKS_PER_SHARD", 2)
    monkeypatch.setattr(plan, "MOST_SHARDS", 3)
    starts = np.arange(packs + 1) * 7
    found = plan.PackPlan(order=np.arange(packs * 7), starts=starts, tile_cap=1)
    shards = [found.shard(number) for number in range(found.shards)]
    assert [len(shard) - 1 for shard in shards] == sizes
    assert [shard[0] for shard in shards] == [7 * sum(sizes[:number]) for number in range(3)]
    assert shards[-1][-1] == starts[-1]
