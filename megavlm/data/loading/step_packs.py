"""The packs of the steps to come, and what the index says of them.

All ranks look at the packs of the whole step: their weights make the loss's divisor. That costs a
look into each dataset that the step draws from, so a blend of many datasets is looked at for
several steps at once.
"""

from __future__ import annotations

import numpy as np

from megavlm.data.loading.blend import BlendedDataset, Packs
from megavlm.data.loading.order import Order

# Packs of each dataset that are looked up at once, on average.
PACKS_A_LOOK = 64


class StepPacks:
    """Packs of a run, step by step.

    Args:
        dataset: the packs.
        plan: their order.
        size: packs of a step.
    """

    def __init__(self, dataset: Packs, plan: Order, size: int) -> None:
        self._dataset = dataset
        self._plan = plan
        self._size = size
        datasets = len(dataset.datasets) if isinstance(dataset, BlendedDataset) else 0
        self._steps = max(1, -(-datasets * PACKS_A_LOOK // size))
        self._start = 0
        self._ids = np.empty(0, np.int64)
        self._records = np.empty(0)

    def after(self, consumed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and the records in the index of the step that follows ``consumed`` packs;
        both [size].
        """
        first = consumed - self._start
        if not 0 <= first <= len(self._ids) - self._size:
            self._start = consumed
            self._ids = self._plan.pack_ids(consumed, self._steps * self._size)
            self._records = self._dataset.records(self._ids)
            first = 0
        own = slice(first, first + self._size)
        return self._ids[own], self._records[own]
