"""Who is named for which figures; tests/ranks measures real ones."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock, patch

import pytest

from megavlm.config.schema import Health
from megavlm.health import speed_check
from megavlm.health.speed_check import Speeds, findings, partner, summary

# Two machines of four GPUs: tensor-parallel pairs, data-parallel groups of four.
GOOD = Speeds(
    hosts=("a",) * 4 + ("b",) * 4,
    compute=(600.0, 610.0, 605.0, 590.0, 600.0, 600.0, 580.0, 610.0),
    clock=(1000.0, 1000.01, 1000.0, 1000.0, 1000.2, 1000.2, 1000.2, 1000.2),
    pairs={1: (150.0,) * 8, 4: (40.0,) * 8},
    groups={"tensor": (200.0,) * 8, "data": (45.0,) * 8},
    members={"tensor": (0, 0, 2, 2, 4, 4, 6, 6), "data": (0, 1, 0, 1, 0, 1, 0, 1)},
    seconds=1.25,
)


def _with(values: tuple[float, ...], **changes: float) -> tuple[float, ...]:
    listed = list(values)
    for rank, value in changes.items():
        listed[int(rank.removeprefix("rank"))] = value
    return tuple(listed)


def test_nobody_is_named_where_all_are_alike() -> None:
    assert findings(GOOD, Health(), on_gpu=True) == []
    assert summary(GOOD).endswith(
        "580 to 610 TFLOP/s a rank, tensor groups 200 to 200 GB/s, data groups 45 to 45 GB/s"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(compute=_with(GOOD.compute, rank5=80.0)),
            ["rank 5 (on b) computes 80 TFLOP/s, 600 are usual"],
        ),
        (
            dict(pairs=GOOD.pairs | {4: _with(GOOD.pairs[4], rank6=2.0)}),
            ["rank 6 (on b) exchanges 2 GB/s with ranks 4 away, 40 are usual"],
        ),
        (
            dict(
                groups=GOOD.groups | {"tensor": _with(GOOD.groups["tensor"], rank2=9.0, rank3=9.0)}
            ),
            ["the tensor group of ranks 2-3 moves 9 GB/s, 200 are usual"],
        ),
        (dict(clock=_with(GOOD.clock, rank7=1040.0)), ["rank 7 (on b): its clock is 39.9 s ahead"]),
    ],
)
def test_who_is_slow_is_named(changes: dict, words: list[str]) -> None:
    found = findings(dataclasses.replace(GOOD, **changes), Health(), on_gpu=True)
    assert len(found) == 1 and all(word in found[0] for word in words), found


def test_who_was_slow_once_only_is_not_named() -> None:
    slow = dataclasses.replace(
        GOOD,
        compute=_with(GOOD.compute, rank5=80.0),
        pairs=GOOD.pairs | {4: _with(GOOD.pairs[4], rank6=2.0)},
        groups=GOOD.groups | {"tensor": _with(GOOD.groups["tensor"], rank0=9.0, rank1=9.0)},
    )
    slower = dataclasses.replace(slow, compute=_with(slow.compute, rank1=60.0))
    assert len(findings(slower, Health(), on_gpu=True)) == 4
    assert _checked(slower, GOOD) == _checked(GOOD, slower) == []
    words = ["rank 5 ", "rank 6 ", "the tensor group of ranks 0-1 "]
    found = _checked(slower, slow)
    assert len(found) == 3 and all(line.startswith(word) for line, word in zip(found, words))


def _checked(*measured: Speeds) -> list[str]:
    with patch.object(speed_check, "_measure", side_effect=measured):
        _, found = speed_check.check(Mock(), Mock(asynchronous=True), Health())
    return found


def test_a_wrong_network_card_everywhere_is_seen_on_gpus() -> None:
    slow = dataclasses.replace(GOOD, groups=GOOD.groups | {"data": (0.4,) * 8})
    [found] = findings(slow, Health(), on_gpu=True)
    assert (
        "2 of 2 data groups" in found
        and "of ranks 0, 2, 4, 6, 0.4 GB/s" in found
        and "NCCL_SOCKET_IFNAME" in found
    )
    assert findings(slow, Health(), on_gpu=False) == []
    assert findings(slow, Health(least_gb_per_s=0.0), on_gpu=True) == []


def test_a_rank_without_partner_at_a_distance_is_not_slow() -> None:
    alone = dataclasses.replace(GOOD, pairs={1: _with(GOOD.pairs[1], rank7=0.0)})
    assert findings(alone, Health(), on_gpu=True) == []


@pytest.mark.parametrize(("size", "distance"), [(2, 1), (3, 1), (8, 1), (8, 4), (12, 4), (7, 2)])
def test_partners_agree_and_nearly_everybody_has_two(size: int, distance: int) -> None:
    for turn in range(2):
        others = [partner(rank, size, distance, turn) for rank in range(size)]
        assert all(
            other is None or (others[other] == rank and other != rank)
            for rank, other in enumerate(others)
        )
    has_one = [
        any(partner(rank, size, distance, turn) is not None for turn in range(2))
        for rank in range(size)
    ]
    assert all(has_one)
    if size % (2 * distance) == 0 and size > 2 * distance:
        assert all(
            partner(rank, size, distance, 0) != partner(rank, size, distance, 1)
            for rank in range(size)
        )
