"""Timing whole steps: warm-up on every pack first, then events around each step, without waiting
for the device in between.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megavlm.data.loading.dataset import PackedDataset
from megavlm.planner.flops import training_cost
from tools.benchmark import kernel_times
from tools.benchmark.cases import Case
from tools.benchmark.feed import Feed

LEAST_STEPS = 3
# Batches of Transformer Engine's layers have tiles in multiples of it (FP8: of more).
TILE_MULTIPLE = 4
COUNTS = ("tokens", "squared_lengths", "tiles", "squared_tiles", "supervised")


class Session(Protocol):
    """A model that is being trained."""

    device: torch.device
    feed: Feed
    notes: dict[str, object]

    def step(self) -> Tensor:
        """One update; the loss, on the device."""


class Clock:
    """Marks in the device's queue, or in time where there is no queue."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        """Put a mark behind all work so far."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        """Wait until the work so far is done."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def intervals_ms(self) -> list[float]:
        """Milliseconds between neighbouring marks."""
        self.wait()
        pairs = zip(self._marks, self._marks[1:])
        return [
            start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3 for start, end in pairs
        ]


def measure(
    session: Session,
    case: Case,
    packs: PackedDataset,
    pack_ids: list[int],
    *,
    steps_s: float,
    peak_tflops: float,
) -> dict:
    """Measure the figures of a case.

    Args:
        session: what is measured, built.
        case: its name and shapes.
        packs: the dataset.
        pack_ids: the packs that are stepped on, in turn.
        steps_s: seconds that warm-up, and then the timed steps, may take each; fewer steps are made
            where one takes long.
        peak_tflops: what the utilisation is a share of.
    """
    waiting = Clock(session.device)
    # Every number of tiles once: kernels are built, and memory is set apart, for each.
    warm_up = steps_to_warm_up(packs.index[np.array(pack_ids)]["tiles"], case.packs_per_step)
    start = time.perf_counter()
    first = None
    one_s = float("inf")
    for number in range(-(-len(pack_ids) // case.packs_per_step)):
        began = time.perf_counter()
        loss = session.step()
        waiting.wait()
        one_s = min(one_s, time.perf_counter() - began)  # others compile
        if first is None:
            first = loss
            start = time.perf_counter()  # The first step compiles: that is no time of steps.
        if number + 1 >= warm_up and time.perf_counter() - start > steps_s:
            break
    steps = max(LEAST_STEPS, min(2 * len(pack_ids), int(steps_s / one_s)))
    waited = session.feed.waited_s
    taken = session.feed.taken
    clock = Clock(session.device)
    clock.mark()
    for _ in range(steps):
        loss = session.step()
        clock.mark()
    each_ms = clock.intervals_ms()
    count = steps * case.packs_per_step
    stepped = np.array([pack_ids[(taken + number) % len(pack_ids)] for number in range(count)])
    figures = _figures(case, packs, stepped, each_ms, peak_tflops)
    figures |= {
        "data_wait_ms": round((session.feed.waited_s - waited) / steps * 1e3, 3),
        "peak_memory_gib": round(_peak_bytes(session.device) / 2**30, 2),
        "loss_first": float(first),
        "loss_last": float(loss),
        **session.notes,
    }
    if case.is_profiled:
        figures["kernels"] = kernel_times.table(kernel_times.record(session.step, session.device))
    return figures


def steps_to_warm_up(tiles: np.ndarray, packs_per_step: int) -> int:
    """Count the steps until every padded number of tiles has come once, three at least.

    Args:
        tiles: of the packs, in the order in which they are stepped on.
        packs_per_step: packs of each step.
    """
    padded = -(-np.maximum(tiles, 1) // TILE_MULTIPLE)
    _, first_seen = np.unique(padded, return_index=True)
    return max(LEAST_STEPS, int(first_seen.max()) // packs_per_step + 1)


def _figures(
    case: Case, packs: PackedDataset, stepped: np.ndarray, each_ms: list[float], peak_tflops: float
) -> dict:
    rows = packs.index[stepped]
    seconds = sum(each_ms) / 1e3
    size = {name: float(rows[name].sum()) for name in COUNTS}
    flops = training_cost(case.architecture, case.trainable).by_part(**size)
    tflops = sum(flops.values()) / seconds / 1e12
    return {
        "tokens_per_s": round(size["tokens"] / seconds, 1),
        "tiles_per_s": round(size["tiles"] / seconds, 2),
        "step_ms": round(statistics.median(each_ms), 3),
        "step_ms_least": round(min(each_ms), 3),
        "step_ms_most": round(max(each_ms), 3),
        "tflops": round(tflops, 3),
        "mfu": round(tflops / peak_tflops, 4),
        "steps": len(each_ms),
        "packs_per_step": case.packs_per_step,
        "tokens_per_step": size["tokens"] / len(each_ms),
        "tiles_per_step": size["tiles"] / len(each_ms),
        "tflop_per_step": {
            part: round(count / len(each_ms) / 1e12, 4) for part, count in flops.items()
        },
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
