"""The order of packs is a permutation in each epoch, and a pure function of the position."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megavlm.data.loading.order import Plan


@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 5, 7, 8, 31, 63, 64, 65, 97, 1000, 1024, 1025, 7919, 65537, 10**6]
)
def test_every_epoch_is_a_permutation(size):
    plan = Plan(num_packs=size, seed=5)
    for epoch in range(2 if size > 10000 else 5):
        assert np.array_equal(np.sort(plan.pack_ids(epoch * size, size)), np.arange(size))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(Plan(num_packs=100, seed=seed).pack_ids(epoch * 100, 100))
        for seed in (-1, 0, 1, 2**40)
        for epoch in range(10)
    }
    assert len(orders) == 40


def test_all_orders_of_few_packs_appear():
    plan = Plan(num_packs=4, seed=0)
    orders, counts = np.unique(
        plan.pack_ids(0, 4 * 2400).reshape(-1, 4), axis=0, return_counts=True
    )
    assert len(orders) == 24
    assert counts.min() > 60  # 100 expected of each


def test_neighbours_are_scattered():
    ids = Plan(num_packs=100_000, seed=1).pack_ids(0, 100_000).astype(np.float64)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(len(ids)), ids)[0, 1]) < 0.02


def test_splits_do_not_change_the_order():
    plan = Plan(num_packs=37, seed=3)
    whole = plan.pack_ids(11, 200)
    parts = [
        plan.pack_ids(11 + start, count) for start, count in ((0, 1), (1, 99), (100, 0), (100, 100))
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert [int(plan.at(11 + place)) for place in range(200)] == whole.tolist()
    for ranks in (2, 8):
        shares = [plan.at(np.arange(11 + rank, 211, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.stack(shares, axis=1).ravel(), whole)


def test_stored_order():
    assert Plan(num_packs=3, shuffle=False).pack_ids(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_the_order_is_fixed_for_all_time():
    """A checkpoint stores positions, so this order must never change."""
    assert Plan(num_packs=10, seed=42).pack_ids(0, 20).tolist() == [
        7,
        9,
        5,
        2,
        4,
        3,
        1,
        8,
        0,
        6,
        2,
        5,
        6,
        8,
        9,
        7,
        3,
        0,
        4,
        1,
    ]


def test_a_billion_packs():
    start = time.perf_counter()
    ids = Plan(num_packs=10**9, seed=1).pack_ids(10**12 + 7, 4096)
    assert time.perf_counter() - start < 1
    assert len(np.unique(ids)) == 4096
    assert 0 <= ids.min() < ids.max() < 10**9


def test_no_packs():
    with pytest.raises(ValueError, match="0 packs"):
        Plan(num_packs=0)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 100, 1000, 4097])
@pytest.mark.parametrize("group", [1, 2, 3, 16, 64, 5000])
@pytest.mark.parametrize("strata", [1, 2, 8])
def test_every_epoch_is_a_permutation_in_groups_too(size, group, strata):
    plan = Plan(num_packs=size, seed=5, group=group, strata=strata)
    for epoch in range(3):
        assert np.array_equal(np.sort(plan.pack_ids(epoch * size, size)), np.arange(size))


def test_a_group_comes_from_one_neighbourhood():
    plan = Plan(num_packs=10_001, seed=3, group=16)
    far = 0
    for step in range(2000):  # more than three epochs
        ids = plan.pack_ids(step * 16, 16)
        spread = np.sort((ids - ids[0] + 5000) % 10_001)
        far += spread[-1] - spread[0] >= 8 * 16
    assert far <= 4  # where an epoch ends


def test_groups_are_others_in_every_epoch():
    plan = Plan(num_packs=4096, seed=3, group=16)
    first, second = (
        {frozenset(ids) for ids in plan.pack_ids(epoch * 4096, 4096).reshape(-1, 16).tolist()}
        for epoch in (0, 1)
    )
    assert len(first) == 256 and not first & second


def test_groups_that_follow_each_other_come_from_all_strata():
    packs = 10_000
    group = 16
    strata = 8
    plan = Plan(num_packs=packs, seed=3, group=group, strata=strata)
    for epoch in (0, 1):
        start = -(-epoch * packs // (group * strata)) * group * strata  # of the first whole cycle
        ids = plan.pack_ids(start, 70 * group * strata).reshape(-1, strata, group)
        assert are_in_their_strata(ids, packs)
        spread = np.sort((ids - ids[:, :, :1] + packs // 2) % packs, axis=2)
        assert (spread[..., -1] - spread[..., 0]).max() < 8 * group * 1.05


@pytest.mark.parametrize("packs", [200, 300, 1500, 20_000])
def test_every_step_is_mixed_in_small_datasets_and_across_epochs_too(packs):
    batch = 64
    plan = Plan(num_packs=packs, seed=3, group=batch // 8, strata=8)
    steps = plan.pack_ids(0, 3 * packs // batch * batch).reshape(-1, batch) / packs
    assert np.abs(steps.mean(axis=1) - 0.5).max() < 0.13
    assert (steps > 0.75).mean(axis=1).max() < 0.4


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32])
def test_no_rank_has_the_dearer_strata_of_a_step(ranks):
    batch = 64
    plan = Plan(num_packs=2**16, seed=3, group=batch // 8, strata=8)
    costs = plan.pack_ids(0, 2**16).reshape(-1, batch // ranks, ranks) / 2**16
    of_rank = costs.mean(axis=1).mean(axis=0)
    assert np.abs(of_rank - 0.5).max() < 0.03


def test_a_window_of_groups_does_not_reach_into_another_stratum():
    plan = Plan(num_packs=1280, seed=3, group=16, strata=8)  # 10 groups in each
    for epoch in range(3):
        assert are_in_their_strata(plan.pack_ids(epoch * 1280, 1280).reshape(-1, 8, 16), 1280)


def are_in_their_strata(ids: np.ndarray, packs: int) -> bool:
    """Tell whether groups of cycles, [cycles, 8, group], come from one of 8 strata each, whose
    bounds differ between epochs by up to an eighth of a stratum.
    """
    order = np.array([0, 1, 2, 3, 7, 6, 5, 4])[:, None]
    past_middle = (ids * 8 / packs - order - 9 / 16 + 4) % 8 - 4
    return np.abs(past_middle).max() < 9 / 16 + 0.01


def test_strata_come_in_another_order_in_each_of_them_and_in_every_epoch():
    plan = Plan(num_packs=4096, seed=3, group=16, strata=4)
    first, second = (plan.pack_ids(epoch * 4096, 4096).reshape(-1, 4, 16) for epoch in (0, 1))
    for number in range(4):
        assert not np.array_equal(first[:, number].min(axis=1), second[:, number].min(axis=1))
    order = [np.argsort(np.argsort(first[:, number].min(axis=1))) for number in (1, 2)]
    assert abs(np.corrcoef(order)[0, 1]) < 0.4


def test_packs_that_make_no_whole_cycle_are_shuffled_too():
    few = Plan(num_packs=40, seed=3, group=8, strata=8)
    orders = {tuple(few.pack_ids(epoch * 40, 40).tolist()) for epoch in range(20)}
    assert len(orders) == 20
    steps = [np.diff(order) for order in orders]
    assert np.mean([np.mean(np.abs(step) == 1) for step in steps]) < 0.2


@pytest.mark.parametrize("name", ["group", "strata"])
def test_no_group(name):
    with pytest.raises(ValueError, match=f"--data.{name} 0"):
        Plan(num_packs=5, **{name: 0})
