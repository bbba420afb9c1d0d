"""What signals do before, in and after training."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.train.stop_signal import StopRequest, ignore_save_signal

PROGRAM = Path(__file__).parents[2] / "pretrain_vlm.py"


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Let SIGUSR1 fail a test instead of ending the process of all tests."""

    def fail(*_: object) -> None:
        raise AssertionError("SIGUSR1 would end the run")

    before = signal.signal(signal.SIGUSR1, fail)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_sigusr1_before_the_ranks_meet_is_told_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def parse_stages(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise SystemExit(0)

    monkeypatch.setattr("megavlm.config.stages.parse_stages", parse_stages)
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "nothing is trained now, so nothing is saved\n" in capfd.readouterr().err


def test_sigusr1_asks_for_a_checkpoint_in_training_alone(capfd: pytest.CaptureFixture) -> None:
    ignore_save_signal()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.wants_save and not stop.asked
    stop.wants_save = False
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not stop.wants_save and capfd.readouterr().err.count("SIGUSR1") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(number: int) -> None:
    ended = []
    before = signal.signal(number, lambda *_: ended.append(number))
    try:
        with StopRequest() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked and not stop.is_late and not ended
            os.kill(os.getpid(), number)
            assert ended == [number]
    finally:
        signal.signal(number, before)


def test_the_limit_of_a_stage_counts_from_the_start_of_the_command() -> None:
    stop = StopRequest()
    assert not stop.is_late
    stop.limit(1e-12)
    assert stop.is_late and stop.asked
    stop.limit(1.0)
    assert not stop.asked


def test_what_ends_a_run_is_told_apart() -> None:
    with StopRequest() as stop:
        stop.limit(1e-9)
        assert stop.asked and stop.cause == "--training.max_hours"
        stop.limit(0)
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.cause == "a signal"
