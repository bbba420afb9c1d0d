"""Alarms, answers and reports, with ranks that are threads; tests/ranks has real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from megavlm.config.schema import Health
from megavlm.health.diagnostics import Collective, stacks
from megavlm.health.watchdog import Answer, Watchdog, report

QUICK = Health(hang_factor=1, hang_seconds=1)


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing was told in 120 s"
        time.sleep(0.05)


def test_one_rank_tells_what_all_do_when_one_of_them_is_late() -> None:
    told = []
    store = dist.HashStore()
    with ExitStack() as running:
        dogs = [
            running.enter_context(Watchdog(store, rank, 3, QUICK, 30, told.append))
            for rank in range(3)
        ]
        for dog in dogs:
            dog.enter("step", 7)
        _wait_for(lambda: told)
        dogs[0].enter("step", 8), dogs[1].enter("step", 8), dogs[2].enter("step", 8)
        _wait_for(lambda: len(told) > 1)
    assert "ranks 0-2" in told[0] and "step 7" in told[0] and "test_watchdog.py" in told[0]
    assert told[1].startswith("the run continued") and len(told) == 2
    assert not [rank for rank in range(3) if store.check([f"answer/1/{rank}"])]


def test_a_run_that_goes_on_and_ends_at_once_says_so() -> None:
    told = []
    with Watchdog(dist.HashStore(), 0, 1, QUICK, 30, told.append) as dog:
        _wait_for(lambda: told)
        dog.enter("step", 1)
    assert told[1].startswith("the run continued")


def test_a_rank_that_does_not_answer_is_named() -> None:
    told = []
    store = dist.HashStore()
    with (
        Watchdog(store, 0, 3, QUICK, 30, told.append) as first,
        Watchdog(store, 2, 3, QUICK, 30, told.append) as last,
    ):
        first.enter("step", 1), last.enter("step", 1)
        _wait_for(lambda: told)
    [text] = told
    assert "it waits for rank 1, not answering" in text and "rank 1: no answer" in text


def test_progress_keeps_it_quiet() -> None:
    told = []
    with Watchdog(dist.HashStore(), 0, 1, QUICK, 30, told.append) as dog:
        for step in range(25):
            dog.enter("step", step)
            time.sleep(0.1)
    assert told == []


def test_it_can_be_switched_off() -> None:
    told = []
    with Watchdog(dist.HashStore(), 0, 1, Health(hang_factor=0, hang_seconds=1), 30, told.append):
        time.sleep(1.5)
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    assert told == []


def test_a_store_that_is_gone_makes_each_rank_speak_for_itself() -> None:
    class Gone(dist.HashStore):
        def add(self, key: str, value: int) -> int:
            if threading.current_thread().name == "watchdog":
                raise dist.DistNetworkError("connection reset")
            return 0

        def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
            raise dist.DistNetworkError("connection reset")

    told = []
    with Watchdog(Gone(), 5, 8, QUICK, 30, told.append):
        _wait_for(lambda: told)
    assert (
        told[0].startswith(
            "rank 5 makes no progress and cannot ask the others (connection reset); start 0\n"
        )
        and "main thread:" in told[0]
    )


def test_the_limit_follows_the_longest_waits_of_each_kind() -> None:
    dog = Watchdog(dist.HashStore(), 0, 1, Health(hang_factor=10, hang_seconds=60), 30)
    assert dog.limit("step") == 600  # nothing is known yet
    dog.enter("step", 1)
    for _ in dog.count(range(3)):
        assert dog.limit("step") == 600  # its first collectives take long
    dog.enter("evaluation", 1)
    dog.enter("evaluation", 1)
    assert dog.limit("step") == 60 and dog.limit("evaluation") == 600
    dog._waits["step"].append(12.0)
    assert dog.limit("step") == 120 and dog.limit("checkpoint") == 600
    dog._waits["step"].append(1000.0)
    assert dog.limit("step") == 900  # half of the collectives' timeout


def test_packs_are_passed_on_and_counted() -> None:
    dog = Watchdog(dist.HashStore(), 0, 1, QUICK, 30)
    dog.enter("step", 4)
    packs = dog.count("abc")
    assert next(packs) == "a" and str(dog._mark) == "step 4, pack 1 came last"
    dog.enter("step", 5)
    assert list(packs) == ["b", "c"] and str(dog._mark) == "step 5, waits for pack 3"


def _answer(place: tuple[int, int], *waits_in: str) -> Answer:
    return Answer(
        host="node",
        doing=f"step {place[0]}, pack {place[1]}",
        progress=place,
        waits_in=waits_in,
        stacks="main thread:\n  a.py:1 f: x",
    )


@pytest.mark.parametrize(
    ("answers", "size", "words"),
    [
        (
            {
                0: _answer((3, 1), "all_reduce"),
                1: _answer((3, 1), "all_reduce"),
                2: _answer((3, 1)),
            },
            3,
            "rank 2, in no collective",
        ),
        (
            {0: _answer((3, 1), "all_reduce"), 1: _answer((2, 8), "send")},
            2,
            "rank 1, behind the others",
        ),
        ({0: _answer((3, 1), "all_reduce")}, 4, "ranks 1-3, not answering"),
        (
            {0: _answer((3, 1), "all_reduce"), 1: _answer((3, 1), "all_gather")},
            2,
            "all ranks wait at the same point",
        ),
    ],
)
def test_the_one_that_is_waited_for_is_named_first(
    answers: dict[int, Answer], size: int, words: str
) -> None:
    assert words in report(answers, size, 75.0).splitlines()[0]


def test_ranks_at_the_same_place_share_a_paragraph() -> None:
    answers = {rank: _answer((3, 2), "all_reduce") for rank in range(64)} | {9: _answer((3, 1))}
    lines = report(answers, 64, 75.0).splitlines()
    assert [line for line in lines if line.startswith("rank")] == [
        "rank 9 (on node): step 3, pack 1; in no collective",
        "ranks 0-8, 10-63 (on node): step 3, pack 2; in all_reduce",
    ]


def test_a_stack_names_file_line_and_function() -> None:
    assert (
        "test_watchdog.py" in stacks() and "test_a_stack_names_file_line_and_function" in stacks()
    )


def test_a_collective_in_words() -> None:
    found = Collective(
        name="nccl:all_reduce", group="DATA_PARALLEL_GROUP", number=12, shapes=((4, 2), ())
    )
    assert str(found) == "nccl:all_reduce number 12 of group DATA_PARALLEL_GROUP, on 4x2, scalar"
