"""Figures that wait for a tracker behind a network, which a thread sends to it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

from megavlm.train.trackers import Tracker, one_line

_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 600.0
# How long a run that has ended waits for what is still to be sent.
_LAST_SECONDS = 20.0
_MOST_RECORDS = 20_000

_Record = tuple[int, Mapping[str, float]]


class Outbox(Tracker):
    """A tracker whose server may be slow, or away for hours, and costs the run nothing.

    Training goes on while a thread sends. While the server cannot be reached, figures wait, and the
    thread tries again later. What was never sent is told at the end.

    Args:
        name: of the tracker.
        make: makes the tracker.
        log: told when the tracker is away, when it is back, and what it did not get.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], log: Callable[[str], None]):
        self.name = name
        self._make = make
        self._log = log
        self._waiting: deque[_Record] = deque()
        self._dropped = 0
        self._has_ended = False
        self._has_failed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._send, name=f"{name} outbox", daemon=True)
        self._thread.start()

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step, for the thread to send."""
        with self._change:
            self._waiting.append((step, numbers))
            if len(self._waiting) > _MOST_RECORDS:
                self._waiting.popleft()
                self._dropped += 1
            self._change.notify()

    def close(self, *, has_failed: bool) -> None:
        """Wait a moment for what is not yet sent, and tell what remains."""
        with self._change:
            self._has_ended = True
            self._has_failed = has_failed
            self._change.notify()
        self._thread.join(_LAST_SECONDS)
        with self._change:
            missing = len(self._waiting) + self._dropped
        if missing:
            self._log(f"WARNING: {self.name} did not get {missing} records of figures")

    def _send(self) -> None:
        """Send records in their order until the run has ended: the thread's work."""
        tracker: Tracker | None = None
        pause = 0.0
        while True:
            try:
                tracker = tracker or self._make()
                record = self._next()
                if record is None:
                    tracker.close(has_failed=self._has_failed)
                    return
                tracker.record(*record)
            except Exception as error:  # the network's, the package's: whatever it is
                if not pause:
                    self._log(
                        f"WARNING: {self.name} takes no figures ({one_line(error)}); training"
                        " continues, and they are sent when it does"
                    )
                pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
                with self._change:
                    if self._has_ended:
                        return
                    self._change.wait_for(lambda: self._has_ended, pause)
                continue
            if pause:
                pause = 0.0
                self._log(f"{self.name} takes figures again")
            self._remove(record)

    def _next(self) -> _Record | None:
        """Wait for the next record; none: the run has ended, and all are sent."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._has_ended)
            return self._waiting[0] if self._waiting else None

    def _remove(self, sent: _Record) -> None:
        with self._change:
            # It is gone already if it was the oldest of too many.
            if self._waiting and self._waiting[0] is sent:
                self._waiting.popleft()
