"""How far a long job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_INTERVAL_SECONDS = 30.0

Done = Callable[[int], None]
"""Told how many more bytes are done."""


def ignore(amount: int) -> None:
    """Take no notice of progress."""


class Progress:
    """A context that shows progress on stderr. In a log it writes a line every 30 seconds, even if
    nothing is done meanwhile.

    Args:
        what: the work, for the log line.
        unit: of the numbers.
        total: to be done.
        done: of it before.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0) -> None:
        self._what = what
        self._unit = unit
        self._total = total
        self._done = done
        self._before = done
        self._note = ""
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True
            )

    def add(self, amount: int, note: str = "") -> None:
        """So much more is done; ``note`` says more about it."""
        self._done += amount
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def _log_until_end(self) -> None:
        """Write a line now and then, in a thread of its own."""
        while not self._ended.wait(LOG_INTERVAL_SECONDS):
            self._log()

    def _log(self) -> None:
        """Write one line."""
        share = self._done / self._total if self._total else 1.0
        seconds = time.monotonic() - self._start
        rate = (self._done - self._before) / max(seconds, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._what}: {share:.1%} of {self._total} {self._unit} in {seconds:.0f} s"
            f" ({rate:,.1f} {self._unit}/s{left}){note}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Self:
        if self._bar is None:
            threading.Thread(target=self._log_until_end, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
