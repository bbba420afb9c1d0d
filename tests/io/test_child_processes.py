"""What a child's end raises is raised inside the context alone, whenever the child ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from megavlm.io.child_processes import ChildWatcher

FORK = multiprocessing.get_context("fork")


class Gone(Exception):
    pass


def _raise_if_ended(process: multiprocessing.Process) -> None:
    if process.exitcode is not None:
        raise Gone


@pytest.fixture
def handler() -> object:
    before = signal.getsignal(signal.SIGCHLD)
    yield before
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _started(seconds: float) -> multiprocessing.Process:
    process = FORK.Process(target=time.sleep, args=(seconds,))
    process.start()
    return process


def test_the_end_of_a_child_is_raised_while_something_is_waited_for(handler: object) -> None:
    process = _started(0.2)
    start = time.monotonic()
    with pytest.raises(Gone), ChildWatcher(lambda: _raise_if_ended(process)):
        time.sleep(120)
    assert time.monotonic() - start < 60
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_child_that_ended_before_is_raised_at_the_start(handler: object) -> None:
    process = _started(0)
    process.join()
    with pytest.raises(Gone), ChildWatcher(lambda: _raise_if_ended(process)):
        raise AssertionError("entered")
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("fails_inside", [True, False])
def test_a_child_that_ends_while_the_context_is_left_leaves_no_handler_behind(
    monkeypatch: pytest.MonkeyPatch, handler: object, fails_inside: bool
) -> None:
    """Python calls a handler as the first thing in any function, such as the context's end."""
    process = _started(60)
    watcher = ChildWatcher(lambda: _raise_if_ended(process))
    leave = ChildWatcher.__exit__

    def leave_late(self: ChildWatcher, *error: object) -> None:
        process.kill()
        process.join()
        os.kill(os.getpid(), signal.SIGCHLD)  # in case its own was told of before it was waited for
        leave(self, *error)

    monkeypatch.setattr(ChildWatcher, "__exit__", leave_late)
    with pytest.raises(Gone), watcher:
        if fails_inside:
            raise ValueError("an error of its own")
    assert signal.getsignal(signal.SIGCHLD) == handler
    os.kill(os.getpid(), signal.SIGCHLD)  # another child ends: nothing is raised


def test_a_handler_that_was_set_after_it_is_kept(handler: object) -> None:
    later = signal.Handlers.SIG_IGN
    with ChildWatcher(lambda: None):
        signal.signal(signal.SIGCHLD, later)
    assert signal.getsignal(signal.SIGCHLD) == later


def test_one_inside_another_leaves_the_outer_one_its_children(handler: object) -> None:
    process = _started(0.2)
    inner = ChildWatcher(lambda: None)
    start = time.monotonic()
    with pytest.raises(Gone), ChildWatcher(lambda: _raise_if_ended(process)), inner:
        time.sleep(120)
    assert time.monotonic() - start < 60
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_handler_that_was_set_before_it_is_called_and_one_that_calls_it_later_is_harmless(
    handler: object,
) -> None:
    told = []
    signal.signal(signal.SIGCHLD, lambda number, frame: told.append("before"))
    process = _started(60)
    with ChildWatcher(lambda: _raise_if_ended(process)):
        watching = signal.getsignal(signal.SIGCHLD)
        # PyTorch's DataLoader sets such a handler, which stays.
        signal.signal(signal.SIGCHLD, lambda *of_signal: watching(*of_signal))
    process.kill()
    process.join()
    os.kill(os.getpid(), signal.SIGCHLD)
    assert "before" in told


def test_outside_the_main_thread_nothing_is_called(handler: object) -> None:
    process = _started(0)
    process.join()
    done = []

    def wait() -> None:
        with ChildWatcher(lambda: _raise_if_ended(process)):
            done.append(signal.getsignal(signal.SIGCHLD))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert done == [handler]
