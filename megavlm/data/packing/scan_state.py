"""How far a scan is, as files: rows, rejected records, and a state that says how much of the two is
good. A crash at any moment loses the work since the last save and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavlm.data.packing import job_state
from megavlm.data.packing.job_state import (
    SHOWN_REJECTS,
    check_length,
    read_rejects,
    reject_lines,
)
from megavlm.data.records.reject import FILTERS, REPAIRABLE, Reject
from megavlm.io import atomic

ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("line", "<i4"),
        ("tokens", "<i4"),
        ("tiles", "<i4"),
        ("source", "<i4"),
        ("difficulty", "<f4"),
        ("window", "<i4"),
    ]
)
STATE_NAME = "scan.json"
ROWS_PER_CHUNK = 2**20
# More names of unread keys than this are records' data, not keys. A state with all of them would
# grow with the records.
MOST_UNREAD_KEYS = 200


@dataclass(kw_only=True)
class SourceCounts:
    """What was read of one source.

    Args:
        records: read.
        images: of the records that can be packed.
        deep_images: of them, those with more than 8 bits a channel.
        turned_images: of them, those that are not stored upright, as their EXIF says.
        rejects: rejected records for each reason.
        unread: how many records have a key that was not read, for each key.
        tasks: that are done.
    """

    records: int = 0
    images: int = 0
    deep_images: int = 0
    turned_images: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    tasks: int = 0

    def add(self, other: SourceCounts) -> None:
        """Add other counts of the same source, but tasks; of the keys, the most frequent stay."""
        self.records += other.records
        self.images += other.images
        self.deep_images += other.deep_images
        self.turned_images += other.turned_images
        for own, more in ((self.rejects, other.rejects), (self.unread, other.unread)):
            for name, count in more.items():
                own[name] = own.get(name, 0) + count
        if len(self.unread) > MOST_UNREAD_KEYS:
            self.unread = dict(Counter(self.unread).most_common(MOST_UNREAD_KEYS))


@dataclass(kw_only=True)
class ScanState:
    """How far a scan is, and all that it needs to resume.

    Args:
        sources: counts of each source.
        tasks: that are done.
        bytes: of the annotation files that are done.
        rows: number of good rows in ``rows_name``.
        rejects_bytes: number of good bytes in ``rejects_name``.
        first_rejects: the first few rejected records; those that a filter left out come last.
        complete: whether all is done.
        generation: how often rejected records were read again with success; names the files.
    """

    sources: list[SourceCounts]
    tasks: int = 0
    bytes: int = 0
    rows: int = 0
    rejects_bytes: int = 0
    first_rejects: list[Reject] = field(default_factory=list)
    complete: bool = False
    generation: int = 0

    @property
    def rows_name(self) -> str:
        """Return the name of the file of rows."""
        return f"rows.{self.generation}.bin"

    @property
    def rejects_name(self) -> str:
        """Return the name of the list of rejected records."""
        return f"rejects.{self.generation}.jsonl"

    @property
    def packable(self) -> int:
        """Return the number of records that are not rejected."""
        return sum(source.records - sum(source.rejects.values()) for source in self.sources)


def count_measured(
    state: ScanState, source: int, counts: SourceCounts, rejects: Sequence[Reject]
) -> None:
    """Count a task of a source that is done."""
    state.tasks += 1
    state.sources[source].tasks += 1
    state.sources[source].add(counts)
    if rejects:
        state.first_rejects = shown_first([*state.first_rejects, *rejects])


def first_unfinished(state: ScanState) -> tuple[int, int]:
    """Return the first source that may have tasks left, and how many of its tasks are done: sources
    before it need not be looked into again.
    """
    if sum(source.tasks for source in state.sources) != state.tasks:
        return 0, state.tasks  # an earlier version counted those of all sources together
    first = max((number for number, one in enumerate(state.sources) if one.tasks), default=0)
    return first, state.sources[first].tasks if state.sources else 0


def shown_first(rejects: Sequence[Reject]) -> list[Reject]:
    """Return the first few rejected records, and of those that a filter left out as many as there
    is room for: they are as they were asked to be, and do not end a job.
    """
    return sorted(rejects, key=lambda each: each.reason in FILTERS)[:SHOWN_REJECTS]


def read_state(folder: Path, sources: int) -> ScanState:
    """Read how far the scan in a folder is; raises DamagedStateError."""
    state = job_state.read_state(folder / STATE_NAME, ScanState, sources, {"tasks": 0})
    if state is None:
        return ScanState(sources=[SourceCounts() for _ in range(sources)])
    check_length(folder / state.rows_name, state.rows * ROW.itemsize)
    check_length(folder / state.rejects_name, state.rejects_bytes)
    return state


def repairable_rejects(folder: Path, state: ScanState) -> list[Reject]:
    """Read the rejected records that may pass after a media file was restored."""
    if not any(reason in source.rejects for source in state.sources for reason in REPAIRABLE):
        return []
    rejects = read_rejects(folder / state.rejects_name, state.rejects_bytes)
    return [each for each in rejects if each.reason in REPAIRABLE]


def merge_repaired(
    folder: Path,
    state: ScanState,
    rows: np.ndarray,
    now: Mapping[tuple[int, int], Sequence[Reject]],
) -> None:
    """Write the next generation of files: with the rows of repaired records in their places, and
    with the rejects as they are now. The state must be saved afterwards.

    Args:
        folder: of the scan.
        state: of the scan; its counts are brought up to date by the caller.
        rows: of type ``ROW``, in the order of the files.
        now: why a record is left out now, by source and offset; empty: it is repaired.
    """
    old = folder / state.rows_name
    rejects = read_rejects(folder / state.rejects_name, state.rejects_bytes)
    state.generation += 1
    left = [one for each in rejects for one in now.get((each.source, each.offset), [each])]
    content = reject_lines(left)
    atomic.write_bytes(folder / state.rejects_name, content)
    state.rejects_bytes = len(content)
    state.first_rejects = shown_first(left)
    with open(old, "rb") as before, open(folder / state.rows_name, "wb") as after:
        done = 0
        kept = state.rows
        while kept:
            chunk = np.fromfile(before, ROW, min(kept, ROWS_PER_CHUNK))
            kept -= len(chunk)
            behind = _position(rows, chunk[-1]) if kept else len(rows)
            both = np.concatenate([chunk, rows[done:behind]])
            order = np.lexsort((both["offset"], both["source"]))  # windows stay in their order
            after.write(both[order].tobytes())
            done = behind
        after.write(rows[done:].tobytes())
        atomic.sync_file(after)
    state.rows += len(rows)


def _position(rows: np.ndarray, last: np.void) -> int:
    """Return how many of the sorted ``rows`` lie before ``last``."""
    before = (rows["source"] < last["source"]) | (
        (rows["source"] == last["source"]) & (rows["offset"] < last["offset"])
    )
    return int(np.count_nonzero(before))
