"""A run of which rank 1 is late once, or a rank ends while the others are late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from megavlm.config.cli import from_yaml
from megavlm.health import lost_machines
from megavlm.train import loop, run_job
from megavlm.train.stages import launch_all

_LATE_STEP = 4


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _freeze(seconds: float) -> None:
    """Stop the whole process, all of its threads, until a shell wakes it."""
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


def _end_or_sleep(ending: int, seconds: float, reached: Path) -> None:
    """End a rank as the kernel does that kills a process. The other one, if it is of another
    machine, has reached the store and this machine before.
    """
    if os.environ["RANK"] == str(ending):
        is_watched = os.environ["LOCAL_WORLD_SIZE"] == "1"
        while is_watched and reached.with_suffix(f".{1 - ending}").stat().st_size < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    _sleep(seconds)


def _note_reached(path: Path) -> None:
    """Write a character to a file for each connection to another machine that comes about."""
    reach = lost_machines.reach
    path.touch()

    def noted(address: lost_machines.Address) -> tuple[lost_machines.Address, str]:
        answer = reach(address)
        with path.open("a") as file:
            file.write(".")
        return answer

    lost_machines.reach = noted


def main(how: str, seconds: float, config: Path) -> None:
    """Train as ``pretrain_vlm.py`` does, with a step that begins late on one rank. If that one, or
    the first, which serves the store, ends in a step or before the model is built, the others are
    late, which would hear of it in their first collective.
    """
    ending = 0 if how == "first ends" else 1
    reached = config.with_suffix(".reached")
    _note_reached(reached.with_suffix(f".{os.environ['RANK']}"))
    if how == "ends early":
        run_job.build_job = lambda *_: _end_or_sleep(ending, seconds, reached)
    train_step = loop.train_step
    steps = []

    def late(*arguments, **settings):
        steps.append(1)
        if len(steps) == _LATE_STEP:
            if how in ("ends", "first ends"):
                _end_or_sleep(ending, seconds, reached)
            elif os.environ["RANK"] == "1":
                {"sleeps": _sleep, "freezes": _freeze}[how](seconds)
        return train_step(*arguments, **settings)

    loop.train_step = late
    launch_all([from_yaml(config)])
