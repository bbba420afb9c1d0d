"""A process that writes shards fails the save if it is killed, and does not outlive its rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megavlm.checkpoint.writer_processes import WriterError, watched_writers

FORK = multiprocessing.get_context("fork")


def _be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _start_no_thread() -> None:
    """Fail to tell results, for which a queue starts a thread."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse
    FORK.Queue().put(1)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what waits inside for longer."""

    def end(*_: object) -> None:
        raise TimeoutError(f"{seconds} s are over")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("fail", "status", "told"),
    [(_be_killed, -signal.SIGKILL, "killed by signal 9"), (_start_no_thread, 1, "with status 1")],
)
def test_a_writer_that_fails_is_an_error_and_the_others_end(
    fail: Callable[[], None], status: int, told: str
) -> None:
    """What waits for the queue waits for ever."""
    before = signal.getsignal(signal.SIGCHLD)
    queue = FORK.JoinableQueue()
    queue.put(1)
    other = FORK.Process(target=time.sleep, args=(60,))
    failing = FORK.Process(target=fail)
    with pytest.raises(WriterError, match=told), at_most(120), watched_writers():
        other.start()
        failing.start()
        queue.join()
    other.join(timeout=120)
    failing.join(timeout=120)
    assert (other.exitcode, failing.exitcode) == (-signal.SIGKILL, status)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_child_that_was_there_before_is_no_writer() -> None:
    other = FORK.Process(target=time.sleep, args=(60,))
    other.start()
    with watched_writers():
        other.kill()
        time.sleep(0.3)  # its end is told before it is waited for
    other.join(timeout=120)


def test_writers_that_end_well_are_no_error() -> None:
    with at_most(120), watched_writers():
        writers = [FORK.Process(target=time.sleep, args=(0.01,)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()


def _start_a_writer(pipe: Connection) -> None:
    with watched_writers():
        writer = FORK.Process(target=time.sleep, args=(60,))
        writer.start()
        pipe.send(writer.pid)
        time.sleep(60)


def test_a_writer_does_not_outlive_its_rank() -> None:
    ours, theirs = FORK.Pipe()
    rank = FORK.Process(target=_start_a_writer, args=(theirs,))
    rank.start()
    with at_most(120):
        writer = ours.recv()
    time.sleep(0.2)  # it has just been forked, and asks to end with its parent
    rank.kill()
    rank.join(timeout=120)
    deadline = time.monotonic() + 120
    while _is_alive(writer):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
