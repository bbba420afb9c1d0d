"""What people and batch schedulers ask of a run by signals: to end after a checkpoint, or to save
one and continue.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from megavlm.config import torchrun

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNAL = signal.SIGUSR1


def ignore_save_signal() -> None:
    """Ignore SIGUSR1, which ends a process by default, and say so: before and after training there
    is nothing to save.
    """
    signal.signal(SAVE_SIGNAL, _tell_of_nothing_to_save)


def _tell_of_nothing_to_save(number: int, frame: FrameType | None) -> None:
    told = f"WARNING: SIGUSR1 on {torchrun.name_of_rank()}: nothing is trained now, so nothing is"
    os.write(2, f"{told} saved\n".encode())  # it may have come inside of a print


class StopRequest:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) came, or that the time is over, so that the run can
    end after a checkpoint instead of at once; and that SIGUSR1 came, which asks for a checkpoint
    alone.

    A second signal to end does so at once. As a context manager it restores the handlers that were
    there.

    Attributes:
        wants_save: whether SIGUSR1 came; set it to false when the checkpoint is saved.
        is_agreed: whether all ranks know that the run is to end.
    """

    def __init__(self) -> None:
        self._signalled = False
        self.wants_save = False
        self.is_agreed = False
        self._start = time.monotonic()
        self._end = float("inf")
        self._before: dict[int, signal.Handlers] = {}
        self._save_before: signal.Handlers = signal.SIG_DFL

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        self._save_before = signal.signal(SAVE_SIGNAL, self._remember_save)
        return self

    def limit(self, max_hours: float) -> None:
        """Set the limit; it counts from when the request was made. 0: any."""
        self._end = self._start + 3600 * max_hours if max_hours else float("inf")

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._end

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._signalled or self.is_late

    @property
    def cause(self) -> str:
        """What asked the run to end, in words."""
        return "--training.max_hours" if self.is_late else "a signal"

    def __exit__(self, *exception) -> None:
        self._restore()
        signal.signal(SAVE_SIGNAL, self._save_before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self._restore()

    def _remember_save(self, number: int, frame: FrameType | None) -> None:
        self.wants_save = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
