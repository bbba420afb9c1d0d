"""How often each sample of a mixture of sources is taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megavlm.data.records.meta_file import Annotations

# Rows of the scan are counted with 32 bits.
MOST_SAMPLES = 2**31 - 1


def take(row_sources: np.ndarray, sources: Sequence[Annotations], seed: int) -> np.ndarray:
    """Return the rows of the scan, each as often as its sample is taken, in their order; int32.

    Without weights a sample is taken ``repeat_time`` times. With weights, as many samples are taken
    in all as ``repeat_time`` alone would take, and each source's share of them is its weight's.
    What is left after whole times goes to a draw of the source's samples.

    Raises:
        ValueError: more samples than a dataset can have.

    Args:
        row_sources: the source of each row.
        sources: all sources.
        seed: fixes the draws.
    """
    groups: dict[str, int] = {}
    # Files of one source are one group, which has the number of the first of them.
    first = np.array(
        [groups.setdefault(source.name, number) for number, source in enumerate(sources)], np.int32
    )
    group_of_row = first[row_sources]
    found = np.bincount(group_of_row, minlength=len(sources)).astype(np.float64)
    # Of a share below 1, the scan has read no more than that share.
    wanted = found * np.maximum([source.repeat_time for source in sources], 1.0)
    weights = np.where(found > 0, [source.weight or 0.0 for source in sources], 0.0)
    if weights.any():
        shares = weights / weights.max()  # first, since the sum may be out of bounds
        wanted = wanted.sum() * shares / shares.sum()
    if wanted.sum() > MOST_SAMPLES:
        raise ValueError(
            f"--meta: repeat_time makes {wanted.sum():.3g} samples of {len(row_sources)}; a dataset"
            f" has at most {MOST_SAMPLES}, so give smaller ones"
        )
    times = np.zeros(len(row_sources), np.int32)
    by_group = np.argsort(group_of_row, kind="stable")
    starts = np.cumsum(found.astype(np.int64)) - found.astype(np.int64)
    for group, (count, total) in enumerate(
        zip(found.astype(int).tolist(), np.rint(wanted).astype(int).tolist(), strict=True)
    ):
        if count:
            own = by_group[starts[group] : starts[group] + count]
            times[own] = total // count
            times[
                np.random.default_rng((seed, 1, group)).choice(own, total % count, replace=False)
            ] += 1
    return np.repeat(np.arange(len(row_sources), dtype=np.int32), times)
