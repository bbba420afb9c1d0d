"""What may hold a run up beside its computation: packs that are not full, waits for the loader, and
memory that is nearly full.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.loading.batch import Batch
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter

_GIB = 2**30


class Supply(Meter):
    """Measures fill, data wait and memory between two reports.

    Args:
        backend: where tensors live.
        capacity: tokens that a pack can hold.
    """

    def __init__(self, backend: Backend, capacity: int) -> None:
        self._backend = backend
        self._capacity = capacity
        self._tokens = 0
        self._packs = 0
        self._waited = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and count how long the host waits for each."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add_step(self, packs: np.ndarray) -> None:
        """Count what the step's packs hold."""
        self._tokens += int(packs["tokens"].sum())
        self._packs += len(packs)

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``fill``, the share of the packs that tokens of the data fill; ``data_wait``,
        seconds a step that the rank which waited longest for its loader did so;
        ``data_wait_rank``, the number of that rank, if there are several; and on GPUs
        ``memory_gib``, the most that any rank has allocated so far. Collective.
        """
        device = self._backend.device
        used = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else 0.0
        own = torch.tensor([self._waited / max(steps, 1), used], dtype=torch.float64, device=device)
        everywhere = own.new_empty(groups.size * len(own))
        dist.all_gather_into_tensor(everywhere, own)
        waits, memory = everywhere.view(groups.size, len(own)).T.tolist()
        longest = max(waits)
        found: Figures = {
            "fill": self._tokens / max(self._packs * self._capacity, 1),
            "data_wait": longest,
        }
        if groups.size > 1:
            found["data_wait_rank"] = float(waits.index(longest))
        if max(memory):
            found["memory_gib"] = max(memory)
        self._tokens = 0
        self._packs = 0
        self._waited = 0.0
        return found
