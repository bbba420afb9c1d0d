"""A run of which rank 1 is late once, or ends while the others are late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from megavlm.config.cli import from_yaml
from megavlm.train import loop, run_job
from megavlm.train.stages import launch_all

_LATE_STEP = 4


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _freeze(seconds: float) -> None:
    """Stop the whole process, all of its threads, until a shell wakes it."""
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


def _end_or_sleep(seconds: float) -> None:
    """End rank 1 as the kernel does that kills a process."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    _sleep(seconds)


def main(how: str, seconds: float, config: Path) -> None:
    """Train as ``pretrain_vlm.py`` does, with a step that begins late on one rank. If that one
    ends, in a step or before the model is built, the others are late, which would hear of it in
    their first collective.
    """
    if how == "ends early":
        run_job.build_job = lambda *_: _end_or_sleep(seconds)
    train_step = loop.train_step
    steps = []

    def late(*arguments, **settings):
        steps.append(1)
        if len(steps) == _LATE_STEP:
            if how == "ends":
                _end_or_sleep(seconds)
            elif os.environ["RANK"] == "1":
                {"sleeps": _sleep, "freezes": _freeze}[how](seconds)
        return train_step(*arguments, **settings)

    loop.train_step = late
    launch_all([from_yaml(config)])
