"""How fast a run goes."""

from __future__ import annotations

import numpy as np

from megavlm.parallel.process_groups import Groups
from megavlm.planner.flops import Cost
from megavlm.train.meters import Clock, Figures, Meter

STEP_SECONDS = "seconds_per_step"
_COUNTS = ("tokens", "squared_lengths", "tiles", "supervised")


class Throughput(Meter):
    """Counts what is trained on between two reports.

    Args:
        cost: FLOPs of training on a tile, a token and so on.
        clock: measures the time of training.
    """

    def __init__(self, cost: Cost, clock: Clock):
        self._cost = cost
        self._clock = clock
        self._restart()

    def add_step(self, packs: np.ndarray) -> None:
        """Count what the step's packs hold."""
        for name in _COUNTS:
            self._counts[name] += float(packs[name].sum())

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return seconds a step, tokens and tiles a second over all ranks, and model TFLOP/s of
        one rank (see ``planner/flops``), since the last report.
        """
        seconds = self._clock.seconds() - self._reported
        found: Figures = {
            STEP_SECONDS: seconds / max(steps, 1),
            "tokens_per_s": self._counts["tokens"] / seconds,
            "tiles_per_s": self._counts["tiles"] / seconds,
            "tflops": self._cost.total(**self._counts) / seconds / groups.size / 1e12,
        }
        self._restart()
        return found

    def _restart(self) -> None:
        self._reported = self._clock.seconds()
        self._counts = dict.fromkeys(_COUNTS, 0.0)
