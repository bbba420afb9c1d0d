"""The stages of one command, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from megavlm.config.schema import Config
from megavlm.train import resume
from megavlm.train.launch import launch


def launch_all(stages: Sequence[Config]) -> None:
    """Run the stages of a command in turn, beginning with the last one that has a checkpoint. One
    that is done is not built again. A signal or ``--training.max_hours``, which counts all stages,
    ends the command after the checkpoint of the stage at hand.
    """
    start = time.monotonic()
    for config in stages[_first(stages) :]:
        if hours := config.training.max_hours:
            left = max(hours - (time.monotonic() - start) / 3600, 1e-9)
            config = replace(config, training=replace(config.training, max_hours=left))
        if launch(config).step < config.training.steps:
            return
        # The model goes before the next one is built.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _first(stages: Sequence[Config]) -> int:
    """Return the number of the stage to begin with."""
    if len(stages) == 1:
        return 0
    begun = [number for number, config in enumerate(stages) if resume.has_begun(config)]
    first = max(begun, default=0)
    is_over = first < len(stages) - 1 and resume.is_done(stages[first])
    return first + 1 if is_over else first
