"""What people and programs see of a run."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys

import pytest

from megavlm.train.console import Lines, Terminal, open_console

VALUES = {
    "loss": 2.34567,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "seconds_per_step": 3.42,
    "tokens_per_s": 45_200.0,
    "tflops": 231.4,
    "mfu": 0.234,
}
SOURCES = {"loss": {"chats": 1.25, "web": 2.5}, "loss_part": {"chats": 0.5, "web": 0.1}}


def visible(text: str) -> str:
    """Remove what colours a text."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_terminal_shows_figures_as_people_read_them() -> None:
    file = io.StringIO()
    Terminal(file, width=400).record(120, 1000, VALUES, SOURCES)
    assert "\x1b[" in file.getvalue()
    words = visible(file.getvalue()).split("  ")
    assert words[:2] == ["step", "120/1000 " + "━" * 20]
    assert words[2:5] == ["loss 2.346", "lr 0.0001", "grad_norm 0.5"]
    assert words[5:9] == ["45.2k tokens/s", "231 TFLOP/s", "23.4% MFU", "3.42 s/step"]
    assert words[9:] == ["left 50 min", "loss of chats 1.25, web 2.5\n"]


def test_a_file_holds_every_figure_under_its_name(capsys: pytest.CaptureFixture) -> None:
    Lines().record(1000, 1000, VALUES, SOURCES)
    assert capsys.readouterr().out == (
        "step 1000 of 1000  loss 2.34567  lr 0.0001  grad_norm 0.5  seconds_per_step 3.42"
        "  tokens_per_s 45200  tflops 231.4  mfu 0.234  loss of chats 1.25, web 2.5\n"
    )


def test_an_evaluation_is_no_step_of_many(capsys: pytest.CaptureFixture) -> None:
    Lines().record(300, 0, {"valid_loss": 2.5}, {})
    assert capsys.readouterr().out == "step 300  valid_loss 2.5\n"
    file = io.StringIO()
    Terminal(file, width=400).record(300, 0, {"valid_loss": 2.5}, {})
    assert visible(file.getvalue()) == "step 300  valid_loss 2.5\n"


def test_a_count_has_all_of_its_digits(capsys: pytest.CaptureFixture) -> None:
    count = {"trainable_parameters": 8_075_365_376}
    Lines().record(0, 1000, count, {})
    assert capsys.readouterr().out == "step 0 of 1000  trainable_parameters 8075365376\n"
    file = io.StringIO()
    Terminal(file, width=400).record(0, 1000, count, {})
    assert visible(file.getvalue()).endswith("  trainable_parameters 8,075,365,376\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_who_reads_decides_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    pytest.importorskip("rich", reason="the console extra is not installed: megavlm[console]")
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(theirs, "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        console = open_console()
        console.log("WARNING: [red]a disk[/red] is full")
        console.record(5, 10, {"loss": 2.5, "seconds_per_step": 30.0}, {})
        output.flush()
        read = b""  # a terminal may hand over a part
        while read.count(b"\n") < 2 and select.select([ours], [], [], 20)[0]:
            read += os.read(ours, 4096)
    text = read.decode().replace("\r\n", "\n")
    os.close(ours)
    first, second, _ = visible(text).split("\n")
    assert first == "WARNING: [red]a disk[/red] is full"
    assert ("\x1b[" in text) == is_terminal
    shown = f"step  5/10 {'━' * 20}  loss 2.5  30 s/step  left 2 min"
    assert second == (
        shown if is_terminal else "step 5 of 10  loss 2.5  seconds_per_step 30  left 2 min"
    )
