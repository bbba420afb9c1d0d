"""Signals between the training process and its loader workers.

A batch scheduler, torchrun and Ctrl-C signal the whole process group. The training process then
saves a checkpoint, for which it needs the batches that its workers still have to make. So workers
obey SIGTERM and SIGINT from their parent only; one whose parent is gone ends by itself. PyTorch's
workers look after that, too, but not those that a fork server has started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from megavlm.io.child_processes import ChildWatcher

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def starting_workers(start_method: str | None = None) -> Iterator[list[BaseProcess]]:
    """Block the signals of ``ENDING`` in processes started inside the context, from their first
    moment. The yielded list holds the processes afterwards.

    The handler of SIGCHLD is left as it was: PyTorch's would raise at any point of the training
    process when a worker dies; ``failing_with_workers`` raises only while a batch is awaited.
    """
    if (start_method or multiprocessing.get_start_method()) != "fork":
        resource_tracker.ensure_running()  # started inside, it would unblock the signals
    before = multiprocessing.active_children()
    started = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield started
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        started += [
            process for process in multiprocessing.active_children() if process not in before
        ]


def ignore_signals_but_from_parent() -> None:
    """Ignore ``ENDING`` in this worker unless the parent sends it, as it does to a stuck one. End
    with the parent.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    for wait in (_exit_when_parent_signals, _exit_when_parent_ends):
        threading.Thread(target=wait, daemon=True).start()


def _exit_when_parent_signals() -> None:
    # With a fork server, its pid differs from the parent's.
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo(ENDING).si_pid != parent:
        pass
    os._exit(0)


def _exit_when_parent_ends() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def kill_frozen(processes: Sequence[BaseProcess]) -> None:
    """Kill the workers that have not ended when they were told to, since this process would wait
    for them at its own end.
    """
    frozen = [process for process in processes if process.is_alive()]
    for process in frozen:
        process.kill()
    for process in frozen:
        process.join(timeout=1)  # one that waits for a storage may not end even then


def failing_with_workers(processes: Sequence[BaseProcess]) -> ChildWatcher:
    """Return a context that raises as soon as a worker dies: ``with failing_with_workers(workers):
    wait()``.

    Args:
        processes: the workers.

    Raises:
        RuntimeError: a worker died; the message says which, and how.
    """
    return ChildWatcher(partial(_require_alive, processes))


def how_ended(processes: Sequence[BaseProcess]) -> str:
    """Say of each worker that is gone how it ended; empty if all are alive."""
    codes = [(process.pid, process.exitcode) for process in processes]
    return "; ".join(
        f"DataLoader worker (pid {pid})"
        + (
            f" was killed by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f" exited unexpectedly with status {code}"
        )
        for pid, code in codes
        if code is not None
    )


def _require_alive(processes: Sequence[BaseProcess]) -> None:
    if ended := how_ended(processes):
        raise RuntimeError(ended)
