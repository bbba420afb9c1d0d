"""A clean end when the machine wants the job gone."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) came, so that the run can end after a checkpoint
    instead of at once.

    A second signal ends the run at once. As a context manager it restores the handlers that were
    there.
    """

    def __init__(self):
        self.asked = False
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
