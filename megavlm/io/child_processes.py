"""Errors about child processes, raised while a rank waits for what they make."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class ChildWatcher:
    """Context that calls a function at its start and whenever a child process ends or stops. What
    the function raises, the context raises at once, from whatever waits inside it. It does nothing
    outside the main thread.

    A child may also end while the context is left. So the handler of SIGCHLD that raises puts back
    the one of before by itself: left behind, it would raise in code that has nothing to do with it.
    The handler of before is called too: it may be that of a context around this one.

    Args:
        check: raises if a child is gone that must not be; again if it is called again.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._is_inside = False

    def __enter__(self) -> Self:
        if _in_main_thread():
            self._before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
            self._is_inside = True
            try:
                signal.signal(signal.SIGCHLD, self._handle)
                self._check()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            if callable(self._before):
                self._before(number, frame)
            # A handler that was set inside and stays may still call this one.
            if self._is_inside:
                self._check()
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        self._is_inside = False
        if _in_main_thread() and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
