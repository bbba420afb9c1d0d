"""How far a scoring is, as files: scores, embeddings, records without a score, and a state that
says how much of them is good. A crash at any moment loses the work since the last save alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavlm.data.packing import job_state
from megavlm.data.records.reject import Reject

ROW = np.dtype([("line", "<i8"), ("score", "<f4")])
STATE_NAME = "state.json"
ROWS_NAME = "rows.bin"
IMAGES_NAME = "images.bin"
UNSCORED_NAME = "unscored.jsonl"


@dataclass(kw_only=True)
class SourceState:
    """What was read of one annotation file.

    Args:
        records: read.
        last_line: line, row or number of the last record.
        scored: records with a score.
        reasons: how many have none for each reason.
    """

    records: int = 0
    last_line: int = 0
    scored: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class ScoringState:
    """How far a scoring is.

    Args:
        sources: what was read of each annotation file.
        tasks: that are done.
        bytes: of the annotation files that are done.
        rows: good rows in ``ROWS_NAME`` and ``IMAGES_NAME``.
        unscored_bytes: good bytes of ``UNSCORED_NAME``.
        first_rejects: the first few records without a score.
        complete: whether all records are read.
    """

    sources: list[SourceState]
    tasks: int = 0
    bytes: int = 0
    rows: int = 0
    unscored_bytes: int = 0
    first_rejects: list[Reject] = field(default_factory=list)
    complete: bool = False

    @property
    def records(self) -> int:
        """Records that were read."""
        return sum(source.records for source in self.sources)


def read_state(folder: Path, sources: int, embedding_bytes: int) -> ScoringState:
    """Read how far the scoring in a folder is; raises DamagedStateError.

    Args:
        folder: of the job.
        sources: annotation files.
        embedding_bytes: of each row, in ``IMAGES_NAME``.
    """
    state = job_state.read_state(folder / STATE_NAME, ScoringState, sources)
    if state is None:
        return ScoringState(sources=[SourceState() for _ in range(sources)])
    job_state.check_length(folder / ROWS_NAME, state.rows * ROW.itemsize)
    job_state.check_length(folder / IMAGES_NAME, state.rows * embedding_bytes)
    job_state.check_length(folder / UNSCORED_NAME, state.unscored_bytes)
    return state
