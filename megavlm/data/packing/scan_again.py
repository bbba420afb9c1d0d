"""Records that a scan rejected for a missing or damaged media file, read again: the file may have
been restored since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megavlm.data.packing.encode import Images
from megavlm.data.packing.executors import EncoderSettings, Executor, ordered_map
from megavlm.data.packing.job_state import save_state
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
    """Read the repairable rejects of a scan that was stopped, and add those that pass to its rows.

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
    rows = []
    repaired = set()
    passed = []
    for reject, measured in zip(
        rejects, ordered_map(measure, tasks, workers, executor), strict=True
    ):
        if len(measured.rows):
            rows.append(measured.rows)
            repaired.add((reject.source, reject.offset))
            passed.append((reject, measured.counts))
    if not repaired:
        return 0
    on_change()
    merge_repaired(folder, state, np.concatenate(rows), repaired)
    for reject, counts in passed:
        _count_passed(state.sources[reject.source], reject, counts)
    save_state(folder / STATE_NAME, state)
    return len(repaired)


def _count_passed(own: SourceCounts, reject: Reject, counts: SourceCounts) -> None:
    """Turn a rejected record into one that passes, in the counts of its source."""
    passed = SourceCounts(
        images=counts.images, deep_images=counts.deep_images, unread=counts.unread
    )
    own.add(passed)
    own.rejects[reject.reason] -= 1
    if not own.rejects[reject.reason]:
        del own.rejects[reject.reason]
