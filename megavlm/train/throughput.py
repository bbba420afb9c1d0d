"""How fast a run goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from megavlm.planner.flops import Cost

STEP_SECONDS = "seconds_per_step"
_COUNTS = ("tokens", "squared_lengths", "tiles", "supervised")


class Pace:
    """Counts what is trained on between two reports.

    Args:
        cost: FLOPs of training on a tile, a token and so on.
        ranks: ranks of the run.
    """

    def __init__(self, cost: Cost, ranks: int):
        self._cost = cost
        self._ranks = ranks
        self._restart()

    def add(self, packs: np.ndarray) -> None:
        """Count a step with its packs: their records in the index."""
        self._steps += 1
        for name in _COUNTS:
            self._counts[name] += float(packs[name].sum())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: evaluating, saving."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Return seconds a step, tokens and tiles a second over all ranks, and model TFLOP/s of
        one (see ``planner/flops``), since the last report.
        """
        seconds = time.perf_counter() - self._start
        found = {
            STEP_SECONDS: seconds / max(self._steps, 1),
            "tokens_per_s": self._counts["tokens"] / seconds,
            "tiles_per_s": self._counts["tiles"] / seconds,
            "tflops": self._cost.total(**self._counts) / seconds / self._ranks / 1e12,
        }
        self._restart()
        return found

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0
        self._counts = dict.fromkeys(_COUNTS, 0.0)
