"""A clean end when the machine wants the job gone, or its time is over."""

from __future__ import annotations

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) came, or that the time is over, so that the run can
    end after a checkpoint instead of at once.

    A second signal ends the run at once. As a context manager it restores the handlers that were
    there.

    Args:
        max_hours: of the run, from now on; 0: any.
    """

    def __init__(self, max_hours: float = 0.0):
        self._signalled = False
        self._end = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._end

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._signalled or self.is_late

    def __exit__(self, *exception) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
