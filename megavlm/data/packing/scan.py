"""First pass over the annotation files: the tokens and tiles of each record, and the records to
leave out.

Of a record only a row of 28 bytes is kept, in a file. What is done is written down now and then,
and a survey that was stopped goes on there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megavlm.data.packing.encode import Images
from megavlm.data.packing.executors import EncoderSettings, Executor, build_encoder, ordered_map
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.open_files import open_entries
from megavlm.data.records.raw_record import Block
from megavlm.data.records.reject import Reject
from megavlm.io import atomic
from megavlm.io.progress import Progress
from megavlm.io.record_file import Rows
from megavlm.io.storage import LocalFiles

ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("line", "<i4"),
        ("tokens", "<i4"),
        ("tiles", "<i4"),
        ("source", "<i4"),
        ("difficulty", "<f4"),
    ]
)
LINES_PER_TASK = 32
# So many records without one that can be used mean a wrong folder or format, which is better told
# now than after hours.
HOPELESS_RECORDS = 2000
SHOWN_REJECTS = 5
ROWS_NAME = "rows.bin"
REJECTS_NAME = "rejects.jsonl"
STATE_NAME = "survey.json"
SAVE_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """Entries of one annotation file, as one task.

    Args:
        settings: of the encoder.
        annotations: the file.
        source: its number.
        block: the entries.
        images: how far images are read.
    """

    settings: EncoderSettings
    annotations: Annotations
    source: int
    block: Block
    images: Images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a span: the number of its records, a row (of type ``ROW``) for each sample, and
    the rejected records.
    """

    span: Span
    records: int
    rows: np.ndarray
    rejects: list[Reject]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All records, measured.

    Args:
        rows: of type ``ROW``, one for each record that can be packed.
        records: number of records of each source.
        rejects: number of rejected records for each reason.
        first_rejects: the first few of them.
    """

    rows: Rows
    records: tuple[int, ...]
    rejects: dict[str, int] = field(default_factory=dict)
    first_rejects: tuple[Reject, ...] = ()

    @property
    def rejected(self) -> int:
        """Number of rejected records."""
        return sum(self.rejects.values())


@dataclass(kw_only=True)
class State:
    """How far a survey is; all that it needs to go on.

    Args:
        tasks: spans that are done.
        bytes: of the annotation files that are done.
        rows: written to ``ROWS_NAME``.
        rejects_bytes: written to ``REJECTS_NAME``.
        records: read of each source.
        rejects: rejected records for each reason.
        first_rejects: the first few of them.
        complete: whether all is done.
    """

    records: list[int]
    tasks: int = 0
    bytes: int = 0
    rows: int = 0
    rejects_bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    first_rejects: list[Reject] = field(default_factory=list)
    complete: bool = False


def survey(
    sources: Sequence[Annotations],
    settings: EncoderSettings,
    folder: Path,
    *,
    images: Images = Images.HEADER,
    workers: int,
    executor: Executor = "processes",
) -> Survey:
    """Measure all records of ``sources``, or go on with it.

    Args:
        sources: annotation files.
        settings: of the encoder.
        folder: where rows and rejected records (``rejects.jsonl``, one JSON object a line, in the
            order of the files) are written.
        images: how far images are read.
        workers, executor: as for ``ordered_map``.

    Returns:
        All records; where none of the first ``HOPELESS_RECORDS`` can be used, only those.
    """
    state = _read_state(folder, len(sources))
    if not state.complete:
        total_bytes = sum(Path(source.path).stat().st_size for source in sources)
        spans = islice(_spans(sources, settings, images), state.tasks, None)
        with (
            open(folder / ROWS_NAME, "ab") as rows,
            open(folder / REJECTS_NAME, "ab") as rejects,
            Progress("reading", "B", total_bytes, state.bytes) as progress,
        ):
            rows.truncate(state.rows * ROW.itemsize)
            rejects.truncate(state.rejects_bytes)
            saved = time.monotonic()
            for measured in ordered_map(measure, spans, workers, executor):
                rows.write(measured.rows.tobytes())
                rejects.write(_note(state, measured))
                progress.add(
                    measured.span.block.size,
                    f"{sum(state.records)} records, {sum(state.rejects.values())} rejected",
                )
                if not state.rows and sum(state.records) >= HOPELESS_RECORDS:
                    break
                if time.monotonic() - saved > SAVE_INTERVAL_SECONDS:
                    _save_state(folder, state, rows, rejects)
                    saved = time.monotonic()
            else:
                state.complete = True
                _save_state(folder, state, rows, rejects)
    return Survey(
        rows=Rows(LocalFiles(folder), ROWS_NAME, ROW, state.rows),
        records=tuple(state.records),
        rejects=dict(sorted(state.rejects.items())),
        first_rejects=tuple(state.first_rejects),
    )


def _note(state: State, measured: Measured) -> bytes:
    """Count what came of a span, and return the lines of its rejected records."""
    lines = "".join(
        json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n"
        for reject in measured.rejects
    ).encode()
    state.tasks += 1
    state.bytes += measured.span.block.size
    state.rows += len(measured.rows)
    state.rejects_bytes += len(lines)
    state.records[measured.span.source] += measured.records
    for reject in measured.rejects:
        state.rejects[reject.reason] = state.rejects.get(reject.reason, 0) + 1
    state.first_rejects += measured.rejects[: SHOWN_REJECTS - len(state.first_rejects)]
    return lines


def _read_state(folder: Path, sources: int) -> State:
    """Read how far the survey in a folder is; it starts again if its state is absent or cut."""
    facts = atomic.read_json(folder / STATE_NAME)
    if facts is None:
        return State(records=[0] * sources)
    facts["first_rejects"] = [Reject(**entry) for entry in facts["first_rejects"]]
    return State(**facts)


def _save_state(folder: Path, state: State, *files: BinaryIO) -> None:
    """Put the files on the disk, and then the state that says how much of them is good."""
    for file in files:
        atomic.sync_file(file)
    atomic.write_text(
        folder / STATE_NAME, json.dumps(dataclasses.asdict(state), ensure_ascii=False)
    )


def measure(span: Span) -> Measured:
    """Encode the records of a span, in a worker, and keep their sizes."""
    encoder = build_encoder(span.settings)
    rows = []
    rejects = []
    block = span.block
    for entry in open_entries(span.annotations.path).read(
        block.offset, block.number, block.entries
    ):
        sample = encoder.encode_entry(
            entry, span.annotations, source=span.source, images=span.images
        )
        if isinstance(sample, Reject):
            rejects.append(sample)
        else:
            rows.append(
                (
                    entry.offset,
                    entry.number,
                    sample.length,
                    sample.tiles,
                    span.source,
                    sample.difficulty,
                )
            )
    return Measured(
        span=span, records=len(rows) + len(rejects), rows=np.array(rows, ROW), rejects=rejects
    )


def _spans(
    sources: Sequence[Annotations], settings: EncoderSettings, images: Images
) -> Iterator[Span]:
    """The annotation files cut into tasks."""
    for source, file in enumerate(sources):
        for block in _wanted(file):
            yield Span(
                settings=settings, annotations=file, source=source, block=block, images=images
            )


def _wanted(file: Annotations) -> Iterator[Block]:
    """The blocks of a file; of one that is taken less than once, those with the first share of its
    entries.
    """
    entries = open_entries(file.path)
    if file.repeat_time >= 1:
        yield from entries.blocks(LINES_PER_TASK)
        return
    left = int(sum(block.entries for block in entries.blocks(LINES_PER_TASK)) * file.repeat_time)
    for block in entries.blocks(LINES_PER_TASK):
        if left > 0:
            yield dataclasses.replace(block, entries=min(block.entries, left))
        left -= block.entries
