"""A run of which rank 1 is late once, or ends while the others are late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from megavlm.config.cli import from_yaml
from megavlm.train import loop
from megavlm.train.stages import launch_all

_LATE_STEP = 4


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _freeze(seconds: float) -> None:
    """Stop the whole process, all of its threads, until a shell wakes it."""
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


def _die(seconds: float) -> None:
    """End as a process does that the kernel kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(how: str, seconds: float, config: Path) -> None:
    """Train as ``pretrain_vlm.py`` does, with a step that begins late on one rank; if that one
    ends, on the others, which would hear of it in their first collective.
    """
    train_step = loop.train_step
    steps = []

    def late(*arguments, **settings):
        steps.append(1)
        if len(steps) == _LATE_STEP:
            if os.environ["RANK"] == "1":
                {"sleeps": _sleep, "freezes": _freeze, "ends": _die}[how](seconds)
            elif how == "ends":
                _sleep(seconds)
        return train_step(*arguments, **settings)

    loop.train_step = late
    launch_all([from_yaml(config)])
