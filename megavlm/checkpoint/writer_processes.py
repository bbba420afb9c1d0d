"""The processes that megatron-core forks to write shards, and waits for without a limit.

If the kernel kills one of them, since memory is full, or one cannot tell its results, since it may
start no more threads, the rank would wait for ever. And if a rank is killed, its processes would:
each waits for a rank that is gone, and keeps its memory, its open connections and its hold on the
GPU, so that the next start finds the GPU full.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.util import register_after_fork

import psutil

from megavlm.io.child_processes import ChildWatcher

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WriterError(RuntimeError):
    """A process that wrote shards was killed, or failed."""


@dataclass(frozen=True)
class _Parent:
    """The process that starts writers; unlike its number it can be referred to weakly, which
    multiprocessing does.

    Args:
        pid: its number.
    """

    pid: int

    def end_child(self) -> None:
        """Make this process end with it."""
        end_with_parent(self.pid)


@contextmanager
def watched_writers() -> Iterator[None]:
    """Watch the processes that are started inside the context; outside the main thread it does
    nothing.

    Raises:
        WriterError: one of them was killed, or ended with another status than 0; the others are
            ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    parent = _Parent(os.getpid())
    register_after_fork(parent, _Parent.end_child)  # as long as there is ``parent``
    others = {process.pid for process in psutil.Process().children()}

    def check() -> None:
        own = [process for process in psutil.Process().children() if process.pid not in others]
        for process in own:
            if failure := _failure(process.pid):
                _end(own)
                raise WriterError(f"process {process.pid}, which wrote shards, {failure}")

    with ChildWatcher(check):
        yield


def end_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends.

    Args:
        parent: number of the parent.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):  # not Linux
        return
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _failure(pid: int) -> str:
    """Return how a child failed, which stays to be waited for; empty if it did not."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it was waited for
        return ""
    if found is None or found.si_status == 0:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"ended with status {found.si_status}; its error is above"
    return (
        f"was killed by signal {found.si_status}; if the memory of the machine was full, the"
        " kernel's log says so"
    )


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()
