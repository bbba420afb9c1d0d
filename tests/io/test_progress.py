"""A log tells where a long job is, even while nothing is done."""

from __future__ import annotations

import re
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


def test_a_short_job_logs_nothing(capfd):
    with progress.Progress("writing", "packs", 1) as shown:
        shown.add(1)
    assert capfd.readouterr().err == ""
