"""A tracker that is slow or away costs the run nothing, and gets what it missed."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from megavlm.train import outbox
from megavlm.train.outbox import Outbox

SECONDS = 30


class Server:
    """A tracker: each call of it waits until ``answers`` is set, and fails while ``fails`` is.

    Args:
        records: after which ``has_all`` is set.
    """

    name = "Server"

    def __init__(self, records: int = 0):
        self.answers = threading.Event()
        self.answers.set()
        self.fails = threading.Event()
        self.has_all = threading.Event()
        self.got: list[tuple[int, Mapping[str, float]]] = []
        self.closed: list[bool] = []
        self._records = records

    def make(self) -> Server:
        self._answer()
        return self

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        self._answer()
        self.got.append((step, numbers))
        if len(self.got) == self._records:
            self.has_all.set()

    def show(self, step: int, task: str, rows: object) -> None:
        raise AssertionError("shows nothing")

    def close(self, *, has_failed: bool) -> None:
        self._answer()
        self.closed.append(has_failed)

    def _answer(self) -> None:
        assert self.answers.wait(SECONDS)
        if self.fails.is_set():
            raise ConnectionError("no route\nto host")


def test_training_does_not_wait_for_a_silent_server() -> None:
    server = Server(records=3)
    server.answers.clear()
    box = Outbox("Server", server.make, pytest.fail)
    for step in (1, 2, 3):
        box.record(step, {"loss": 1.0 / step})
    assert not server.got
    server.answers.set()
    box.close(has_failed=True)
    assert [step for step, _ in server.got] == [1, 2, 3] and server.closed == [True]


@pytest.mark.parametrize("is_away_at_the_start", [True, False])
def test_what_was_missed_in_an_outage_is_sent_after_it(
    is_away_at_the_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE_SECONDS", 0.01)
    server = Server(records=4)
    told: list[str] = []
    is_told = threading.Event()

    def log(text: str) -> None:
        told.append(text)
        is_told.set()

    if is_away_at_the_start:
        server.fails.set()
    box = Outbox("Server", server.make, log)
    box.record(1, {"loss": 1.0})
    server.fails.set()
    for step in (2, 3, 4):
        box.record(step, {"loss": 1.0 / step})
    assert is_told.wait(SECONDS)
    server.fails.clear()
    assert server.has_all.wait(SECONDS)
    box.close(has_failed=False)
    assert server.got == [(step, {"loss": 1.0 / step}) for step in (1, 2, 3, 4)]
    assert server.closed == [False]
    assert len(told) == 2 and "ConnectionError: no route to host" in told[0]
    assert told[1] == "Server takes figures again"


def test_a_run_that_ends_in_an_outage_tells_what_was_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "_MOST_RECORDS", 2)
    server = Server()
    server.fails.set()
    told: list[str] = []
    box = Outbox("Server", server.make, told.append)
    for step in (1, 2, 3):
        box.record(step, {"loss": 1.0})
    box.close(has_failed=False)
    assert told[-1] == "WARNING: Server did not get 3 records of figures" and len(told) == 2


def test_a_run_does_not_wait_long_for_a_server_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "_LAST_SECONDS", 0.01)
    server = Server()
    server.answers.clear()
    told: list[str] = []
    box = Outbox("Server", server.make, told.append)
    box.record(1, {"loss": 1.0})
    box.close(has_failed=False)
    assert told == ["WARNING: Server did not get 1 records of figures"]
    server.answers.set()


def test_the_newest_records_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_MOST_RECORDS", 2)
    server = Server()
    server.answers.clear()
    box = Outbox("Server", server.make, pytest.fail)
    for step in (1, 2, 3):
        box.record(step, {"loss": 1.0})
    told: list[str] = []
    box._log = told.append
    server.answers.set()
    box.close(has_failed=False)
    assert [step for step, _ in server.got] == [2, 3] and len(told) == 1
