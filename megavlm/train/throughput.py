"""How fast a run goes."""

from __future__ import annotations

import numpy as np
import torch

from megavlm.parallel.process_groups import Groups
from megavlm.planner.flops import Cost
from megavlm.train.meters import Clock, Figures, Meter

STEP_SECONDS = "seconds_per_step"
TOKENS_PER_SECOND = "tokens_per_s"
TFLOPS = "tflops"
MFU = "mfu"
# Dense BF16 TFLOP/s by what the names of GPUs hold, from NVIDIA's data sheets.
_PEAKS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0}
_COUNTS = ("tokens", "squared_lengths", "tiles", "squared_tiles", "supervised")


def peak_of(device: torch.device) -> float:
    """Return the dense BF16 TFLOP/s of a GPU that is known by its name, and 0 for all else."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAKS.items() if part in name), 0.0)


class Throughput(Meter):
    """Counts what is trained on between two reports.

    Args:
        cost: FLOPs of training on a tile, a token and so on.
        clock: measures the time of training.
        peak_tflops: of a rank, which MFU is a share of; 0: there is no MFU.
    """

    def __init__(self, cost: Cost, clock: Clock, peak_tflops: float = 0.0):
        self._peak_tflops = peak_tflops
        self._cost = cost
        self._clock = clock
        self._restart()

    def add_step(self, packs: np.ndarray) -> None:
        """Count what the step's packs hold."""
        for name in _COUNTS:
            self._counts[name] += float(packs[name].sum())

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return seconds a step, tokens and tiles a second over all ranks, and model TFLOP/s of
        one rank (see ``planner/flops``), since the last report; MFU too, if the peak is known.
        """
        seconds = self._clock.seconds() - self._reported
        found: Figures = {
            STEP_SECONDS: seconds / max(steps, 1),
            TOKENS_PER_SECOND: self._counts["tokens"] / seconds,
            "tiles_per_s": self._counts["tiles"] / seconds,
            TFLOPS: self._cost.total(**self._counts) / seconds / groups.size / 1e12,
        }
        if self._peak_tflops:
            found[MFU] = found[TFLOPS] / self._peak_tflops
        self._restart()
        return found

    def _restart(self) -> None:
        self._reported = self._clock.seconds()
        self._counts = dict.fromkeys(_COUNTS, 0.0)
