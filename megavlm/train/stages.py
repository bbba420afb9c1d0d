"""The stages of one command, in turn."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from megavlm.config.schema import Config
from megavlm.train import resume
from megavlm.train.launch import launch
from megavlm.train.stop_signal import StopRequest


def launch_all(stages: Sequence[Config]) -> None:
    """Run the stages of a command in turn, beginning with the last one that has a checkpoint. One
    that is done is not built again. A signal or ``--training.max_hours``, which counts all stages,
    ends the command after the checkpoint of the stage at hand.
    """
    with StopRequest() as stop:
        for config in stages[_first(stages) :]:
            stop.limit(config.training.max_hours)
            if launch(config, stop).step < config.training.steps or stop.is_agreed:
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
