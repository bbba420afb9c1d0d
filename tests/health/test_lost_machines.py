"""Machines of which one is lost, slow, stopped, or done: objects beside each other stand for their
ranks, and their connections are real. tests/ranks/test_health.py has real ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megavlm.health import lost_machines
from megavlm.health.lost_machines import LostMachineWatch, Machines, is_unanswered
from megavlm.io import processes

FORK = multiprocessing.get_context("fork")
PATIENCE = 4
LOCAL_SIZE = 2
WAIT_SECONDS = 120


@pytest.fixture
def store_at() -> Iterator[tuple[str, int]]:
    """Serve the port of a store."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Note which addresses are asked after a silence."""
    told: list[tuple[str, int]] = []

    def ask(address: tuple[str, int]) -> bool:
        told.append(address)
        return is_unanswered(address)

    monkeypatch.setattr(lost_machines, "is_unanswered", ask)
    return told


class Cluster:
    """Ranks of several machines, all of which have begun."""

    def __init__(self, store_at: tuple[str, int], machines: int) -> None:
        self.store = dist.HashStore()
        size = machines * LOCAL_SIZE
        self.ranks = [
            Machines(self.store, rank, size, rank % LOCAL_SIZE, LOCAL_SIZE, PATIENCE, store_at)
            for rank in range(size)
        ]
        for rank in self.ranks:
            rank.join()
        self.beat(range(machines))

    def of(self, machine: int) -> list[Machines]:
        return self.ranks[machine * LOCAL_SIZE :][:LOCAL_SIZE]

    def beat(self, machines: range | tuple[int, ...], *, is_idle: bool = True) -> list[str]:
        """Let all ranks of machines beat once; return what each has heard."""
        return [rank.beat(is_idle=is_idle) for machine in machines for rank in self.of(machine)]

    def end(self, machine: int) -> None:
        """End all processes of a machine."""
        for rank in self.of(machine):
            rank.close()


def test_all_ranks_hear_of_a_machine_that_is_lost(
    store_at: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(store_at, 3)
    cluster.end(1)
    for _ in range(PATIENCE - 1):
        assert set(cluster.beat((0, 2))) == {""}
    cluster.beat((0, 2))
    [told] = set(cluster.beat((0, 2)))
    assert f"nothing was heard of {socket.gethostname()} (ranks 2-3) for " in told
    assert capsys.readouterr().err.count("the run cannot go on") == 1


def test_machines_that_are_lost_together_are_all_named(
    store_at: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(store_at, 4)
    cluster.end(1)
    cluster.end(2)
    first, second = cluster.of(0)  # who look after machines 1 and 2
    for _ in range(PATIENCE + 1):
        first.beat(is_idle=True)
    for _ in range(PATIENCE):  # one less than it would take alone
        second.beat(is_idle=True)
    told = capsys.readouterr().err
    assert told.count("(ranks 2-3)") == told.count("(ranks 4-5)") == 1


def test_a_machine_that_is_heard_of_by_one_of_its_ranks_is_not_lost(
    store_at: tuple[str, int], asked: list[tuple[str, int]]
) -> None:
    cluster = Cluster(store_at, 2)
    for _ in range(3 * PATIENCE):
        cluster.of(1)[1].beat(is_idle=True)  # the first one is stopped
        assert set(cluster.beat((0,))) == {""}
    assert not asked


def test_a_machine_that_takes_connections_is_not_lost_and_is_seldom_asked(
    store_at: tuple[str, int], asked: list[tuple[str, int]]
) -> None:
    cluster = Cluster(store_at, 2)
    for _ in range(7 * PATIENCE):
        assert set(cluster.beat((0,))) == {""}
    assert len(asked) == LOCAL_SIZE * 3  # after 4, 8 and 16 beats
    cluster.beat((1,))
    for _ in range(PATIENCE):
        cluster.beat((0,))
    assert len(asked) == LOCAL_SIZE * 3  # it is heard of again
    cluster.beat((0,))
    assert len(asked) == LOCAL_SIZE * 4


def test_a_training_that_goes_on_has_lost_no_machine(
    store_at: tuple[str, int], asked: list[tuple[str, int]]
) -> None:
    cluster = Cluster(store_at, 2)
    cluster.end(1)
    for _ in range(3 * PATIENCE):
        assert set(cluster.beat((0,), is_idle=False)) == {""}
    assert not asked
    cluster.beat((0,))
    assert "(ranks 2-3)" in cluster.beat((0,))[0]


def test_a_machine_whose_ranks_are_done_is_not_lost(
    store_at: tuple[str, int], asked: list[tuple[str, int]]
) -> None:
    cluster = Cluster(store_at, 2)
    cluster.of(1)[0].leave()
    cluster.of(1)[1].leave()
    cluster.end(1)
    for _ in range(3 * PATIENCE):
        assert set(cluster.beat((0,))) == {""}
    assert not asked


def test_a_machine_of_which_some_ranks_are_done_can_be_lost(store_at: tuple[str, int]) -> None:
    cluster = Cluster(store_at, 2)
    cluster.of(1)[0].leave()
    cluster.end(1)
    for _ in range(PATIENCE + 1):
        heard = cluster.beat((0,))
    assert "(ranks 2-3)" in heard[0]


def test_a_machine_that_has_not_begun_is_not_lost(store_at: tuple[str, int]) -> None:
    rank = Machines(dist.HashStore(), 0, 2, 0, 1, PATIENCE, store_at)
    rank.join()
    assert {rank.beat(is_idle=True) for _ in range(3 * PATIENCE)} == {""}
    rank.close()


def test_machines_of_different_sizes_look_after_the_next_one(store_at: tuple[str, int]) -> None:
    store = dist.HashStore()
    sizes = {0: 3, 3: 3, 6: 1}
    ranks = {
        first: Machines(store, first, 7, 0, size, PATIENCE, store_at)
        for first, size in sizes.items()
    }
    for rank in ranks.values():
        rank.join()
    assert [rank._other for rank in ranks.values()] == [3, 6, 0]
    for first, size in sizes.items():
        for local_rank in range(1, size):
            other = Machines(store, first + local_rank, 7, local_rank, size, PATIENCE, store_at)
            assert other._other != first
            other.beat(is_idle=True)
    for rank in ranks.values():
        rank.close()


@pytest.mark.parametrize("machines", [2, 3, 4, 128])
def test_each_machine_is_looked_after_by_as_many_ranks_of_others(machines: int) -> None:
    seen: dict[int, set[int]] = {}
    for rank in range(machines * 8):
        one = Machines(dist.HashStore(), rank, machines * 8, rank % 8, 8, PATIENCE, ("", 0))
        seen.setdefault(one._other, set()).add(rank // 8)
    assert sorted(seen) == list(range(0, machines * 8, 8))
    assert {len(others) for others in seen.values()} == {min(8, machines - 1)}
    assert all(first // 8 not in others for first, others in seen.items())


def test_a_warning_of_one_rank_does_not_hush_that_of_another(
    store_at: tuple[str, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    ranks = [
        Machines(store, rank, 4, rank % LOCAL_SIZE, LOCAL_SIZE, PATIENCE, store_at)
        for rank in range(4)
    ]
    for rank in ranks:
        rank.join()
    first, second, *others = ranks
    reach = lost_machines.reach
    monkeypatch.setattr(lost_machines, "reach", lambda address: reach(("127.0.0.1", 0)))
    first.beat(is_idle=True)
    monkeypatch.undo()
    for other in others:
        other.close()
    monkeypatch.setattr(lost_machines, "reach", lambda address: (address, ""))
    for _ in range(PATIENCE + 1):
        second.beat(is_idle=True)
    told = capsys.readouterr().err
    assert "it will not be noticed" in told and "the run cannot go on" in told


def test_a_machine_that_cannot_be_reached_at_the_start_is_told_and_is_not_lost(
    store_at: tuple[str, int],
    asked: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(address: tuple[str, int]) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(lost_machines, "reach", refuse)
    cluster = Cluster(store_at, 2)
    for _ in range(3 * PATIENCE):
        assert set(cluster.beat((0,))) == {""}
    assert not asked
    assert capsys.readouterr().err.count("if the machine is lost, it will not be noticed") == 2


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (TimeoutError(), True),
        (ConnectionRefusedError(), True),
        (OSError(errno.EHOSTUNREACH, ""), True),
        (OSError(errno.EMFILE, "too many open files here"), False),
        (OSError(errno.EADDRNOTAVAIL, "no port is free here"), False),
        (socket.gaierror("no name server"), False),
    ],
)
def test_what_goes_wrong_on_this_side_says_nothing_of_the_other(
    error: OSError, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert is_unanswered(("node1", 1)) == is_lost


def test_the_connections_of_those_who_ask_are_taken_from_the_kernels_queue(
    store_at: tuple[str, int],
) -> None:
    cluster = Cluster(store_at, 2)
    [first, _] = cluster.of(1)
    for _ in range(3):
        assert not is_unanswered(first._listener.getsockname())
    first.beat(is_idle=True)
    with pytest.raises(BlockingIOError):
        first._listener.accept()


def test_others_know_the_machine_that_serves_the_store_by_its_name(
    store_at: tuple[str, int],
) -> None:
    store = dist.HashStore()
    rank = Machines(store, 0, 2, 0, 1, PATIENCE, ("localhost", store_at[1]))
    assert rank.join() == store_at
    rank.close()
    assert json.loads(store.get("machine/0"))["address"] == "localhost"


class Hanging(dist.HashStore):
    """A store whose operations never return once its machine is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.is_lost = threading.Event()
        self.hangs = threading.Event()

    def add(self, key: str, value: int) -> int:
        if self.is_lost.is_set():
            self.hangs.set()
            threading.Event().wait()
        return super().add(key, value)


def watch(
    store: dist.Store,
    store_at: tuple[str, int],
    ends: list[str],
    over: threading.Event,
    rank: int = 0,
) -> LostMachineWatch:
    """Return the watch of a rank of the first of two machines, which has made no progress for a
    while.
    """

    def end(reason: str) -> None:
        ends.append(reason)
        over.set()

    return LostMachineWatch(
        store,
        rank,
        2 * LOCAL_SIZE,
        rank,
        LOCAL_SIZE,
        0.2,
        store_at,
        lambda: 1000.0,
        (EOFError,),
        end,
    )


@pytest.mark.parametrize("is_served", [False, True])
def test_a_store_that_hangs_ends_the_rank_if_its_machine_takes_no_connection(
    is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def ask(address: tuple[str, int]) -> bool:
        answer = is_unanswered(address)
        if is_served:
            over.set()
        return answer

    monkeypatch.setattr(lost_machines, "is_unanswered", ask)
    store = Hanging()
    ends: list[str] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.suppress(InterruptedError),
        watch(store, server.getsockname(), ends, over),
    ):
        if not is_served:
            server.close()
        store.is_lost.set()
        assert store.hangs.wait(WAIT_SECONDS) and over.wait(WAIT_SECONDS)
        raise InterruptedError  # to say that it is done is an operation of the store
    assert ["the key-value store at 127.0.0.1" in reason for reason in ends] == (
        [] if is_served else [True]
    )


def test_a_store_that_hangs_ends_the_other_ranks_of_a_machine_after_its_first(
    store_at: tuple[str, int],
) -> None:
    store = Hanging()
    ends: list[str] = []
    over = threading.Event()
    first = FORK.Process(target=signal.pause)
    first.start()
    one = dataclasses.replace(
        processes.this_process(), pid=first.pid, started=processes.start_ticks(first.pid) or ""
    )
    store.set("process/0", json.dumps(dataclasses.asdict(one)))
    watched = watch(store, store_at, ends, over, rank=1)
    with contextlib.suppress(InterruptedError), watched:
        deadline = time.monotonic() + WAIT_SECONDS
        while watched._machines._leader is None and time.monotonic() < deadline:
            time.sleep(0.05)
        store.is_lost.set()
        assert store.hangs.wait(WAIT_SECONDS)
        assert not watched._machines.has_leader_ended
        first.kill()
        first.join()
        assert over.wait(WAIT_SECONDS)
        raise InterruptedError  # to say that it is done is an operation of the store
    assert "the first rank of this machine has ended" in ends[0]


@pytest.mark.parametrize(("error", "done"), [(None, 1), (ValueError, 0), (EOFError, 1)])
def test_a_rank_says_that_it_is_done_unless_it_alone_ends_with_an_error(
    error: type[Exception] | None, done: int, store_at: tuple[str, int]
) -> None:
    store = dist.HashStore()
    with contextlib.suppress(ValueError, EOFError), watch(store, store_at, [], threading.Event()):
        if error is not None:
            raise error
    assert store.add("done/0", 0) == done
