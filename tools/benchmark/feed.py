"""The packs that are measured on, again and again, through the project's loader; it tells how long
was waited for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from megavlm.data.loading.batch import Batch, BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches, readable
from megavlm.data.loading.order import Plan

MOST_STEPS = 1000


class Feed:
    """An iterator of batches.

    Args:
        packs: the dataset.
        plan: its packs as they are stored, so that a position is a pack's id.
        pack_ids: the packs that are taken, in turn.
        options, workers: as for ``loader.batches``.
    """

    def __init__(
        self,
        packs: PackedDataset,
        plan: Plan,
        pack_ids: list[int],
        options: BatchOptions,
        workers: int,
    ) -> None:
        self.waited_s = 0.0
        self.taken = 0
        self._ids = pack_ids
        positions = [pack_ids[step % len(pack_ids)] for step in range(MOST_STEPS)]
        self._arriving = readable(batches(packs, plan, positions, options, workers=workers))

    def next_ids(self, count: int) -> list[int]:
        """Return the packs that come next."""
        return [self._ids[(self.taken + n) % len(self._ids)] for n in range(count)]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._arriving)
        self.waited_s += time.perf_counter() - start
        self.taken += 1
        return batch

    def close(self) -> None:
        """End the loader's processes."""
        self._arriving.close()
