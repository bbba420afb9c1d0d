"""The rows of the scan that shards are made of. A plan takes them from everywhere, so those of many
shards are read at once, from the front of the file to its end: a billion rows one by one would keep
the main process for hours, on a network file system for days.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megavlm.data.packing.plan import PackPlan
from megavlm.io.record_file import RecordFile

# Of all rows as many are in memory at once as one of so many parts, some bytes for each sample of
# the plan; the whole file is read as many times.
PARTS = 32
LEAST_ROWS = 2**20


def shard_rows(
    rows: RecordFile, plan: PackPlan, numbers: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard with its rows, pack after pack.

    Args:
        rows: of the scan.
        plan: which of them make packs.
        numbers: of the shards.
    """
    most = max(LEAST_ROWS, len(plan.order) // PARTS)
    for some in _together(plan, numbers, most):
        places = [plan.order[plan.shard(number)[0] : plan.shard(number)[-1]] for number in some]
        found = rows[np.concatenate(places)]
        ends = np.cumsum([len(each) for each in places])
        yield from zip(some, np.split(found, ends[:-1]), strict=True)


def _together(plan: PackPlan, numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield shards in lists, each of one shard or of at most so many rows."""
    some: list[int] = []
    count = 0
    for number in numbers:
        starts = plan.shard(number)
        own = int(starts[-1] - starts[0])
        if some and count + own > most:
            yield some
            some = []
            count = 0
        some.append(number)
        count += own
    if some:
        yield some
