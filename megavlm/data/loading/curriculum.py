"""Easy packs before hard ones: the order of a dataset that was packed by levels of difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from megavlm.data.loading.order import Order, Plan


@dataclass(frozen=True, kw_only=True)
class Curriculum(Order):
    """The order of the packs of one dataset: in the first epoch level after level, later all of
    them in one shuffle.

    A pure function of seed and position, as ``Plan`` is; it takes memory for the levels, and none
    for the packs.

    Args:
        levels: packs of each level, in the order in which they are stored.
        seed, shuffle, group, strata: as for ``Plan``, of the packs of a level. A step in which one
            level ends and the next begins has packs of both.
    """

    levels: tuple[int, ...]
    seed: int = 0
    shuffle: bool = True
    group: int = 1
    strata: int = 1

    @property
    def num_packs(self) -> int:
        """Packs in the dataset."""
        return sum(self.levels)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each level starts, as position and as pack, and where the last one ends."""
        return tuple(accumulate(self.levels, initial=0))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See ``Order.at``."""
        flat = np.ravel(positions).astype(np.int64)
        ids = np.empty_like(flat)
        order = {"shuffle": self.shuffle, "group": self.group, "strata": self.strata}
        for level, (start, end) in enumerate(pairwise(self.starts)):
            chosen = (flat >= start) & (flat < end)
            if chosen.any():
                # Seeds of a run and of its levels are far apart.
                plan = Plan(
                    num_packs=end - start,
                    seed=self.seed + (level + 1) * 2**32,
                    start=start,
                    **order,
                )
                ids[chosen] = start + plan.at(flat[chosen])
        later = flat >= self.num_packs
        ids[later] = Plan(num_packs=self.num_packs, seed=self.seed, **order).at(flat[later])
        return ids.reshape(np.shape(positions))
