"""Orders of exchanges in which NCCL's ranks hang are told from those in which they do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.te.exchanges import hang

Line = dict[str, Any]


def reduce(number: int, group: str = "all", size: int = 8) -> Line:
    return dict(kind="all_reduce", number=number, group=group, ranks=[0, 1], sizes=[size])


def messages(number: int, *these: tuple[str, int], size: int = 8) -> Line:
    told = [(way, peer, size) for way, peer in these]
    return dict(kind="messages", number=number, group="pipeline", ranks=[0, 1], messages=told)


def wait(number: int) -> Line:
    return dict(kind="wait", number=number)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([reduce(1), wait(1), reduce(2), wait(2)], [reduce(1), reduce(2), wait(2), wait(1)]),
        # Both send before they receive, in one batch.
        (
            [messages(1, ("send", 1), ("receive", 1)), wait(1)],
            [messages(1, ("receive", 0), ("send", 0)), wait(1)],
        ),
        # Communicators of their own may be asked in any order, as long as nobody waits.
        (
            [reduce(1, "a"), reduce(2, "b"), wait(1), wait(2)],
            [reduce(1, "b"), reduce(2, "a"), wait(1), wait(2)],
        ),
    ],
)
def test_ranks_that_agree_come_through(first: list[Line], second: list[Line]) -> None:
    assert hang([first, second]) == ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([reduce(1), wait(1)], []),
        ([reduce(1)], []),
        ([reduce(1, size=8), wait(1)], [reduce(1, size=9), wait(1)]),
        # Each sends first, and waits until the other receives.
        (
            [messages(1, ("send", 1)), wait(1), messages(2, ("receive", 1)), wait(2)],
            [messages(1, ("send", 0)), wait(1), messages(2, ("receive", 0)), wait(2)],
        ),
        # The same without waiting: a communicator does one thing after the other.
        (
            [messages(1, ("send", 1)), messages(2, ("receive", 1)), wait(2)],
            [messages(1, ("send", 0)), messages(2, ("receive", 0)), wait(2)],
        ),
        ([messages(1, ("send", 1))], [messages(1, ("receive", 0), size=9)]),
        # Communicators of their own in another order, and each rank waits for its first.
        (
            [reduce(1, "a"), wait(1), reduce(2, "b"), wait(2)],
            [reduce(1, "b"), wait(1), reduce(2, "a"), wait(2)],
        ),
    ],
)
def test_ranks_that_wait_for_each_other_hang(first: list[Line], second: list[Line]) -> None:
    assert hang([first, second]).startswith("rank 0: ")
