"""First pass over the annotation files: the tokens and tiles of each record, and the records to leave out.

Of a record only a row of 22 bytes is kept, so that 50 million of them take about a gigabyte.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from megavlm.data.encode import Images
from megavlm.data.progress import Progress
from megavlm.data.record import Annotations, count_records, read_lines
from megavlm.data.reject import Reject
from megavlm.data.workers import EncoderSettings, build_encoder, ordered_map

ROW = np.dtype([("offset", "<i8"), ("line", "<i4"), ("tokens", "<i4"), ("tiles", "<i4"), ("source", "<i2")])
LINES_PER_TASK = 32
# So many records without one that can be used mean a wrong folder or format, which is better told now than after hours.
HOPELESS_RECORDS = 2000
SHOWN_REJECTS = 5


@dataclass(frozen=True, kw_only=True)
class Span:
    """Lines of one annotation file, as one task.

    Args:
        settings: of the encoder.
        annotations: the file.
        source: its number.
        first_line: from 1.
        offset: of the first line, in bytes.
        lines: number of lines, blank ones counted.
        size: bytes of the lines.
        images: how far images are read.
    """

    settings: EncoderSettings
    annotations: Annotations
    source: int
    first_line: int
    offset: int
    lines: int
    size: int
    images: Images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a span: the number of its records, a row (of type ``ROW``) for each sample, and the rejected records."""

    span: Span
    records: int
    rows: np.ndarray
    rejects: list[Reject]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All records, measured.

    Args:
        rows: array of type ``ROW``, one for each record that can be packed.
        records: number of records of each source.
        rejects: number of rejected records for each reason.
        first_rejects: the first few of them.
    """

    rows: np.ndarray
    records: tuple[int, ...]
    rejects: dict[str, int] = field(default_factory=dict)
    first_rejects: tuple[Reject, ...] = ()

    @property
    def rejected(self) -> int:
        """Number of rejected records."""
        return sum(self.rejects.values())


def survey(sources: Sequence[Annotations], settings: EncoderSettings, *, images: Images, workers: int, rejects_file: TextIO) -> Survey:
    """Measure all records of ``sources``; rejected ones are written to ``rejects_file``, one JSON object a line, in the order of the files.

    Raises:
        ValueError: none of the first ``HOPELESS_RECORDS`` records can be used.
    """
    rows, records, reasons, first = bytearray(), [0] * len(sources), Counter(), []
    total_bytes = sum(Path(source.path).stat().st_size for source in sources)
    with Progress("reading", "B", total_bytes) as progress:
        for measured in ordered_map(measure, _spans(sources, settings, images), workers):
            rows += measured.rows.tobytes()
            records[measured.span.source] += measured.records
            for reject in measured.rejects:
                reasons[reject.reason] += 1
                rejects_file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
            first += measured.rejects[: SHOWN_REJECTS - len(first)]
            progress.add(measured.span.size, f"{sum(records)} records, {sum(reasons.values())} rejected")
            if not rows and sum(records) >= HOPELESS_RECORDS:
                break
    return Survey(rows=np.frombuffer(rows, ROW), records=tuple(records), rejects=dict(sorted(reasons.items())), first_rejects=tuple(first))


def measure(span: Span) -> Measured:
    """Encode the records of a span, in a worker, and keep their sizes."""
    encoder = build_encoder(span.settings)
    rows, rejects, records = [], [], 0
    for place, (offset, text) in enumerate(read_lines(span.annotations.path, span.offset, span.lines)):
        if text.isspace():
            continue
        records += 1
        line = span.first_line + place
        sample = encoder.encode_line(text, span.annotations, source=span.source, line=line, images=span.images)
        if isinstance(sample, Reject):
            rejects.append(sample)
        else:
            rows.append((offset, line, sample.length, sample.tiles, span.source))
    return Measured(span=span, records=records, rows=np.array(rows, ROW), rejects=rejects)


def _spans(sources: Sequence[Annotations], settings: EncoderSettings, images: Images) -> Iterator[Span]:
    """The annotation files cut into tasks."""
    for source, file in enumerate(sources):
        wanted = int(count_records(file.path) * file.repeat_time) if file.repeat_time < 1 else None
        line = 0
        for offset, lines, size in _blocks(file.path, wanted):
            yield Span(
                settings=settings,
                annotations=file,
                source=source,
                first_line=line + 1,
                offset=offset,
                lines=lines,
                size=size,
                images=images,
            )
            line += lines


def _blocks(path: str, wanted: int | None) -> Iterator[tuple[int, int, int]]:
    """(offset, lines, bytes) of runs of lines, up to the one that holds record number ``wanted``."""
    start, lines, size, records = 0, 0, 0, 0
    for offset, text in read_lines(path):
        if records == wanted:
            break
        records += not text.isspace()
        lines += 1
        size += len(text)
        if lines == LINES_PER_TASK:
            yield start, lines, size
            start, lines, size = offset + len(text), 0, 0
    if lines:
        yield start, lines, size
