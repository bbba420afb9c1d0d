"""What must hold of every order of packs (plan, blend, shares of batches, curriculum, blend of
curricula), tried on many random cases.
"""

from __future__ import annotations

import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.sampling import BLOCK
from megavlm.data.loading.blend import BlendedDataset, BlendPlan, open_blend
from megavlm.data.loading.curriculum import Curriculum
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches
from megavlm.data.loading.order import Order, Plan
from megavlm.data.store.manifest import Level, read_manifest
from tests.data.samples import make_dataset, run_over

CASES = settings(max_examples=60, deadline=None, derandomize=True)
BATCH = 24  # a multiple of every number of ranks


@st.composite
def one_dataset(draw) -> Order:
    order = {
        "seed": draw(st.integers(-3, 3)),
        "group": draw(st.integers(1, 70)),
        "strata": draw(st.sampled_from([1, 1, 2, 3, 8])),
        "shuffle": draw(st.sampled_from([True, True, False])),
    }
    levels = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    if draw(st.booleans()):
        return Curriculum(levels=tuple(levels), **order)
    return Plan(num_packs=sum(levels), **order)


@st.composite
def any_order(draw) -> Order:
    plans = draw(st.lists(one_dataset(), min_size=1, max_size=4))
    if len(plans) == 1:
        return plans[0]
    # A share below a pack of the batch is refused before.
    weights = [draw(st.floats(1, 4)) for _ in plans]
    windows = draw(st.sampled_from([{}, {"block": BATCH, "window": BATCH}]))
    return BlendPlan(
        plans=tuple(plans), weights=tuple(weights), seed=draw(st.integers(-3, 3)), **windows
    )


LEVELS = Curriculum(levels=(30, 20), seed=1, group=4)
BLENDED = {"plans": (Plan(num_packs=64, seed=1), LEVELS), "weights": (3.0, 1.0), "seed": 5}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Plan(num_packs=64, seed=42), 93410429),
        (Plan(num_packs=1000, seed=42, group=4), 1202918303),
        (Plan(num_packs=1000, seed=42, group=4, strata=8), 2069501994),
        (Plan(num_packs=1000, seed=42, strata=8), 1683591157),
        (Plan(num_packs=1000, seed=-42, group=4), 1125370945),
        (Plan(num_packs=40, seed=3, group=8, strata=8), 1613741934),
        (LEVELS, 2866274317),
        (Curriculum(levels=(300, 200), seed=1, group=4, strata=8), 3340634788),
        (BlendPlan(**BLENDED), 687573153),
        (BlendPlan(**BLENDED, block=8, window=8), 177020452),
    ],
)
def test_every_order_is_fixed_for_all_time(order, expected):
    """A checkpoint stores positions, so these orders must never change."""
    assert zlib.crc32(order.pack_ids(7, 5000).astype("<i8").tobytes()) == expected


@pytest.mark.slow
@CASES
@given(
    order=any_order(),
    consumed=st.one_of(st.integers(0, 30), st.integers(0, 10**12)),
    ranks=st.sampled_from([1, 2, 3, 8]),
    more_ranks=st.sampled_from([1, 2, 3, 8]),
    stop=st.integers(0, 10),
)
def test_stopped_anywhere_and_gone_on_with_at_any_number_of_ranks_the_order_is_the_same(
    order, consumed, ranks, more_ranks, stop
):
    start = consumed * BATCH
    whole = order.pack_ids(start, 10 * BATCH)
    seen = []
    for first, steps, size in ((start, stop, ranks), (start + stop * BATCH, 10 - stop, more_ranks)):
        shares = [
            order.at(np.arange(first + rank, first + steps * BATCH, size)) for rank in range(size)
        ]
        seen += np.stack(shares, axis=1).ravel().tolist()
    assert seen == whole.tolist()
    assert [int(order.at(position)) for position in (start, start + 17)] == [whole[0], whole[17]]
    assert whole.min() >= 0 and whole.max() < order.num_packs


@CASES
@given(order=one_dataset(), epoch=st.one_of(st.integers(0, 3), st.integers(0, 10**9)))
def test_every_epoch_has_every_pack_once(order, epoch):
    packs = order.num_packs
    assert np.array_equal(np.sort(order.pack_ids(epoch * packs, packs)), np.arange(packs))


@CASES
@given(
    levels=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    seed=st.integers(-2, 2),
    group=st.integers(1, 40),
)
def test_in_the_first_epoch_levels_come_one_after_the_other_and_later_all_are_mixed(
    levels, seed, group
):
    curriculum = Curriculum(levels=tuple(levels), seed=seed, group=group)
    packs = sum(levels)
    level_of_pack = np.repeat(np.arange(len(levels)), levels)
    assert level_of_pack[curriculum.pack_ids(0, packs)].tolist() == level_of_pack.tolist()
    later = Plan(num_packs=packs, seed=seed, group=group).pack_ids(packs, 2 * packs)
    assert np.array_equal(curriculum.pack_ids(packs, 2 * packs), later)


def test_a_level_is_shuffled_by_the_seed_and_its_groups_are_the_steps():
    orders = {tuple(Curriculum(levels=(100, 100), seed=seed).pack_ids(0, 200)) for seed in range(5)}
    assert len(orders) == 5
    (order, *_) = orders
    assert [pack + 100 for pack in order[:100]] != list(order[100:])
    # Levels begin in the middle of a step of 16 packs; whole steps inside a level still come from
    # one neighbourhood of 8 groups.
    ids = Curriculum(levels=(1003, 5003), seed=3, group=16).pack_ids(0, 6000).reshape(-1, 16)
    inside = np.delete(ids, 1003 // 16, axis=0)
    far = [np.sort((row - row[0] + 2500) % 5003) for row in inside[1003 // 16 + 1 :] - 1003]
    assert sum(row[-1] - row[0] >= 8 * 16 for row in far) <= 2


def test_without_a_shuffle_levels_come_as_they_are_stored():
    ids = Curriculum(levels=(3, 2), shuffle=False).pack_ids(0, 12)
    assert ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_curriculum_of_billions_of_packs_takes_no_memory():
    curriculum = Curriculum(levels=(10**9, 2 * 10**9, 10**9), seed=1, group=512)
    start = time.perf_counter()
    for place, bounds in (
        (5 * 10**8, (0, 10**9)),
        (29 * 10**8, (10**9, 3 * 10**9)),
        (10**13, (0, 4 * 10**9)),
    ):
        ids = curriculum.pack_ids(place, 4096)
        assert len(np.unique(ids)) == 4096 and bounds[0] <= ids.min() and ids.max() < bounds[1]
    assert time.perf_counter() - start < 2


@CASES
@given(
    weights=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    batch=st.integers(1, 200),
    seed=st.integers(0, 3),
    first=st.integers(0, 10**9),
)
def test_every_batch_has_each_dataset_s_share_rounded_by_the_largest_remainders(
    weights, batch, seed, first
):
    exact = np.array(weights) / sum(weights) * batch
    if exact.min() < 1:
        return
    plans = tuple(Plan(num_packs=50 + place, seed=seed) for place in range(len(weights)))
    blend = BlendPlan(
        plans=plans, weights=tuple(map(float, weights)), seed=seed, block=batch, window=batch
    )
    datasets, places = blend.split(np.arange(first * batch, (first + 20) * batch))
    counts = (datasets.reshape(20, batch, 1) == np.arange(len(weights))).sum(axis=1)
    assert (counts == counts[0]).all() and np.abs(counts[0] - exact).max() < 1
    rounded_up = counts[0] > np.floor(exact)
    if rounded_up.any() and not rounded_up.all():
        remainders = exact - np.floor(exact)
        assert remainders[rounded_up].min() >= remainders[~rounded_up].max() - 1e-9
    for dataset in range(len(weights)):  # each goes on where the batch before ended
        own = places[datasets == dataset]
        assert own.tolist() == list(
            range(first * counts[0][dataset], (first + 20) * counts[0][dataset])
        )


@settings(CASES, max_examples=25)
@given(
    weights=st.lists(st.integers(1, 60), min_size=2, max_size=30),
    seed=st.integers(0, 3),
    first=st.integers(0, 10**6),
)
def test_otherwise_windows_of_64_packs_one_or_many_have_each_share_to_within_two(
    weights, seed, first
):
    plans = tuple(Plan(num_packs=50, seed=seed) for _ in weights)
    blend = BlendPlan(plans=plans, weights=tuple(map(float, weights)), seed=seed)
    datasets, _ = blend.split(np.arange(first * 64, (first + 40) * 64))
    sums = np.cumsum((datasets.reshape(40, 64, 1) == np.arange(len(weights))).sum(axis=1), axis=0)
    shares = np.arange(1, 41)[:, None] * 64 * np.array(weights) / sum(weights)
    # From the start of everything on, to within one; the shares themselves are rounded to 1 /
    # 65,536.
    assert np.abs(sums - shares).max() < 2 and np.abs(np.diff(sums - shares, axis=0)).max() < 2
    whole = np.cumsum(blend.pattern[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(whole - np.arange(1, BLOCK + 1)[:, None] * blend.counts / BLOCK).max() < 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two packed datasets, the second with levels."""
    names = []
    for seed, packs in ((0, 11), (1, 13)):
        folder = tmp_path_factory.mktemp("packs")
        make_dataset(
            folder,
            packs=packs,
            capacity=64,
            text_tokens=(4, 20),
            image_share=0,
            seed=seed,
            levels=(5, 8) * seed,
        )
        names.append(str(folder))
    return names


def test_a_folder_with_levels_is_opened_as_a_curriculum_when_asked(folders):
    assert read_manifest(folders[1]).levels == (
        Level(packs=5, easiest=0, hardest=0),
        Level(packs=8, easiest=1, hardest=1),
    )
    run = run_over(folders, seed=4, weights=(1.0, 1.0), curriculum=True)
    dataset, order = open_blend(run)
    assert isinstance(dataset, BlendedDataset)
    assert order.plans == (Plan(num_packs=11, seed=4), Curriculum(levels=(5, 8), seed=4))
    _, order = open_blend(run_over(folders[1:], seed=4))
    assert order == Plan(num_packs=13, seed=4)


ORDERS = {
    "plan": dict(),
    "blend": dict(weights=(3.0, 1.0)),
    "shares": dict(weights=(3.0, 1.0), batch_shares=True),
    "curriculum": dict(curriculum=True),
}
# By the number of loader workers of each rank, which are processes.
RANKS = {0: (1, 2, 3, 8), 1: (1, 8), 4: (2, 1)}


@pytest.mark.parametrize("workers", RANKS)
@pytest.mark.parametrize("kind", ORDERS)
def test_workers_and_ranks_give_the_same_order(folders, kind, workers):
    """Each number of ranks goes on where the one before stopped."""
    wanted = folders if "weights" in ORDERS[kind] else folders[1:]
    dataset, order = open_blend(run_over(wanted, seed=2, batch=24, group=4, **ORDERS[kind]))
    seen = []
    start = 0
    for ranks in RANKS[workers]:
        end = start + 24
        shares = [
            [
                batch.pack_id
                for batch in batches(
                    dataset, order, range(start + rank, end, ranks), workers=workers
                )
            ]
            for rank in range(ranks)
        ]
        seen += [shares[place % ranks][place // ranks] for place in range(24)]
        start = end
    assert seen == order.pack_ids(0, start).tolist()
    assert isinstance(dataset, PackedDataset if kind in ("plan", "curriculum") else BlendedDataset)
