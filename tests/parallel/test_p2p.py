"""Peeking changes nothing, and every reader gets every item."""

from __future__ import annotations

from itertools import islice

from megavlm.parallel.p2p import SharedBatches


def test_an_item_that_was_peeked_at_is_still_read() -> None:
    items = SharedBatches(iter("abc"))
    reader = items.reader(0)
    assert (items.peek(0), next(reader), next(reader), items.peek(2), next(reader)) == (
        "a",
        "a",
        "b",
        "c",
        "c",
    )


def test_readers_get_the_same_items_which_are_made_once_and_not_before_they_are_asked_for() -> None:
    made: list[object] = []

    def make():
        for _ in range(9):
            made.append(object())
            yield made[-1]

    items = SharedBatches(make(), 2)
    first = items.reader(0)
    second = items.reader(1)
    assert list(islice(first, 2)) == made and len(made) == 2
    assert list(islice(second, 3)) == made and len(made) == 3
    assert next(first) is made[2]


def test_an_item_is_dropped_after_the_last_reader_has_read_it() -> None:
    items = SharedBatches(iter("abcd"), 2)
    first = items.reader(0)
    second = items.reader(1)
    list(islice(first, 3))
    assert sorted(items._kept.values()) == ["a", "b", "c"]
    list(islice(second, 2))
    assert list(items._kept.values()) == ["c"]
