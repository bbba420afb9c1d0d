"""A log tells where a long job is, even while nothing is done."""

from __future__ import annotations

import io
import re
import sys
import time

from megavlm.io import progress


def test_a_log_has_a_line_now_and_then(capfd, monkeypatch):
    assert progress.LOG_INTERVAL_SECONDS == 30
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.05)
    lines: list[str] = []
    with progress.Progress("writing", "packs", 40, 10) as shown:
        shown.add(10, "3 rejected")
        deadline = time.monotonic() + 120
        while len(lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing is added meanwhile
            lines += capfd.readouterr().err.splitlines()
    pattern = r"writing: 50\.0% of 40 packs in \d+ s \([\d,.]+ packs/s, \d+ s left\), 3 rejected"
    assert len(lines) >= 2 and all(re.fullmatch(pattern, line) for line in lines), lines


def first_line(capfd, shown) -> str:
    """Return the first line of a log."""
    deadline = time.monotonic() + 20
    with shown:
        while time.monotonic() < deadline:
            if lines := capfd.readouterr().err.splitlines():
                return lines[0]
            time.sleep(0.01)
    raise AssertionError("no line")


def test_what_was_done_before_has_no_rate_and_nothing_is_all_done(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.05)
    line = first_line(capfd, progress.Progress("reading", "B", 40, 30))
    assert re.fullmatch(r"reading: 75\.0% of 40 B in \d+ s \(0\.0 B/s\)", line), line
    line = first_line(capfd, progress.Progress("reading", "B", 0))
    assert re.fullmatch(r"reading: 100\.0% of 0 B in \d+ s \(0\.0 B/s\)", line), line
    capfd.readouterr()
    time.sleep(0.2)
    assert capfd.readouterr().err == "", "a log goes on after its job"


def test_the_time_that_is_left_follows_from_the_rate(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.05)
    now = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(progress.time, "monotonic", lambda: now[0])
        shown = progress.Progress("writing", "packs", 40, 10)
        now[0] = 100.0
        shown.add(20, "3 rejected")
        with shown:
            while not (lines := capfd.readouterr().err.splitlines()):
                time.sleep(0.01)
    told = "writing: 75.0% of 40 packs in 100 s (0.2 packs/s, 50 s left), 3 rejected"
    assert lines[0] == told


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.01)
    with progress.Progress("writing", "packs", 40, 10) as shown:
        shown.add(10, "3 rejected")
        time.sleep(0.05)
    *_, last = sys.stderr.getvalue().rstrip("\n").split("\r")
    assert last.startswith("writing:  50%") and "| 20.0/40.0 [" in last and "3 rejected]" in last
    assert sys.stderr.getvalue().endswith("\n")
    assert " of 40 packs in " not in sys.stderr.getvalue()


def test_a_short_job_logs_nothing(capfd):
    with progress.Progress("writing", "packs", 1) as shown:
        shown.add(1)
    assert capfd.readouterr().err == ""
