"""Records that a scan rejected for a missing or damaged media file, read again: the file may have
been restored since, or the record be left out for another reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megavlm.data.packing.executors import EncoderSettings, Executor, ordered_map
from megavlm.data.packing.job_state import save_state
from megavlm.data.packing.media import Images
from megavlm.data.packing.scan import ScanTask, measure
from megavlm.data.packing.scan_state import (
    STATE_NAME,
    SourceCounts,
    merge_repaired,
    read_state,
    repairable_rejects,
)
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.raw_record import OffsetRange
from megavlm.data.records.reject import Reject


def read_rejects_again(
    sources: Sequence[Annotations],
    settings: EncoderSettings,
    folder: Path,
    *,
    images: Images,
    workers: int,
    executor: Executor,
    on_change: Callable[[], None],
) -> int:
    """Read the repairable rejects of a scan that was stopped, add those that pass to its rows, and
    note why others are left out now.

    Args:
        sources: annotation files.
        settings: of the encoder.
        folder: of the scan.
        images: how far images are read.
        workers, executor: as for ``ordered_map``.
        on_change: called before anything is written, if a record passes: what was made of the
            rows is out of date.

    Returns:
        The number of records that pass now.
    """
    state = read_state(folder, len(sources))
    rejects = repairable_rejects(folder, state)
    if not rejects:
        return 0
    tasks = [
        ScanTask(
            settings=settings,
            annotations=sources[reject.source],
            source=reject.source,
            records=OffsetRange(
                offset=reject.offset, number=reject.line, records=1, size=reject.bytes
            ),
            images=images,
        )
        for reject in rejects
    ]
    changed = [
        (reject, measured)
        for reject, measured in zip(
            rejects, ordered_map(measure, tasks, workers, executor), strict=True
        )
        if measured.rejects != [reject]
    ]
    if not changed:
        return 0
    passed = sum(not measured.rejects for _, measured in changed)
    if passed:
        on_change()
    rows = np.concatenate([measured.rows for _, measured in changed])
    now = {(reject.source, reject.offset): measured.rejects for reject, measured in changed}
    merge_repaired(folder, state, rows, now)
    for reject, measured in changed:
        _count_again(state.sources[reject.source], reject, measured.counts)
    save_state(folder / STATE_NAME, state)
    return passed


def _count_again(own: SourceCounts, before: Reject, counts: SourceCounts) -> None:
    """Count a rejected record as what it is now, in the counts of its source."""
    own.rejects[before.reason] -= 1
    if not own.rejects[before.reason]:
        del own.rejects[before.reason]
    own.add(dataclasses.replace(counts, records=0))
