"""Ranks of a machine that look after each other's processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megavlm.health.lost_ranks import LostRanks
from megavlm.io import processes

FORK = multiprocessing.get_context("fork")
# Two machines of two ranks each: rank 2 looks after rank 3.
NEXT = 3


@pytest.fixture
def other() -> Iterator[multiprocessing.Process]:
    process = FORK.Process(target=signal.pause)
    process.start()
    yield process
    process.kill()
    process.join()


def post(store: dist.Store, pid: int, started: str = "") -> None:
    """Say what rank 3 says when it begins."""
    started = started or processes.start_ticks(pid) or ""
    one = dataclasses.replace(processes.this_process(), pid=pid, started=started)
    store.set(f"process/{NEXT}", json.dumps(dataclasses.asdict(one)))


def test_all_ranks_hear_of_a_process_that_was_killed(other: multiprocessing.Process) -> None:
    store = dist.HashStore()
    ranks = [LostRanks(store, rank, rank % 2, 2) for rank in range(3)]
    for rank in ranks:
        rank.join()
        assert rank.find() == ""  # rank 3 has not begun
    post(store, other.pid)
    assert [rank.find() for rank in ranks] == ["", "", ""]
    os.kill(other.pid, signal.SIGSTOP)
    assert ranks[2].find() == ""  # frozen, and may go on
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie, for its parent is busy
    assert ranks[2].find().startswith("rank 3 (on ")
    assert ranks[0].find() == ranks[1].find() == ranks[2].find()


def test_a_rank_that_is_done_may_end(other: multiprocessing.Process) -> None:
    store = dist.HashStore()
    rank = LostRanks(store, 2, 0, 2)
    post(store, other.pid)
    assert rank.find() == ""
    LostRanks(store, NEXT, 1, 2).leave()
    other.kill()
    other.join()
    assert rank.find() == ""


def test_a_number_that_another_process_has_now_is_no_sign_of_life() -> None:
    store = dist.HashStore()
    post(store, os.getpid(), started="1")
    assert LostRanks(store, 2, 0, 2).find().startswith("rank 3")


@pytest.mark.parametrize(
    "unlike",
    [
        {"boot": "another boot"},
        {"boot": ""},
        {"namespace": "another"},
        {"namespace": ""},
        {"started": ""},
    ],
)
def test_a_process_that_cannot_be_looked_up_is_not_lost(unlike: dict[str, str]) -> None:
    store = dist.HashStore()
    gone = dataclasses.replace(processes.this_process(), pid=2**22 + 1, started="1")
    told = dataclasses.asdict(dataclasses.replace(gone, **unlike))
    store.set(f"process/{NEXT}", json.dumps(told))
    assert LostRanks(store, 2, 0, 2).find() == ""


def test_a_rank_alone_on_its_machine_looks_after_nobody() -> None:
    store = dist.HashStore()
    post(store, 2**22 + 1, started="1")
    assert LostRanks(store, NEXT, 0, 1).find() == ""
