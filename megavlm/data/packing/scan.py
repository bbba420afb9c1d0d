"""First pass over the annotation files: the tokens and tiles of each sample, and the records to
leave out.

A sample, with the rejected answer beside it, is a row of 32 bytes in a file. Progress is saved now
and then, and a scan that was stopped resumes there. Records that were rejected because a media file
was missing or damaged are read again when it resumes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.data.packing.executors import EncoderSettings, Executor, build_encoder, ordered_map
from megavlm.data.packing.file_ranges import FileToCut, cut_files
from megavlm.data.packing.job_state import reject_lines, save_state
from megavlm.data.packing.media import Images
from megavlm.data.packing.repeats import MOST_SAMPLES
from megavlm.data.packing.scan_state import (
    MOST_UNREAD_KEYS,
    ROW,
    STATE_NAME,
    ScanState,
    SourceCounts,
    count_measured,
    first_unfinished,
    read_state,
)
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.raw_record import OffsetRange
from megavlm.data.records.readers import open_reader
from megavlm.data.records.reject import Reject, count_unwanted
from megavlm.io.progress import Progress
from megavlm.io.record_file import RecordFile
from megavlm.io.remote import file_state
from megavlm.io.storage import LocalFiles

# Few, so that all workers have something to do with a small file; many, so that handing over a task
# of a large one costs little.
RECORDS_PER_TASK = 32
RECORDS_PER_LARGE_TASK = 256
LARGE_FILE_BYTES = 2**23
# So many records without one that can be used mean a wrong folder or format, and the job ends now
# instead of after hours.
HOPELESS_RECORDS = 2000
SAVE_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """Records of one annotation file, as one task.

    Args:
        settings: of the encoder.
        annotations: the file.
        source: its index.
        records: where they are.
        images: how far images are read.
    """

    settings: EncoderSettings
    annotations: Annotations
    source: int
    records: OffsetRange
    images: Images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of a task.

    Args:
        task: its task.
        rows: of type ``ROW``, one for each sample.
        counts: of the records.
        rejects: the rejected records.
    """

    task: ScanTask
    rows: np.ndarray
    counts: SourceCounts
    rejects: list[Reject]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """All records, measured.

    Args:
        rows: of type ``ROW``, one for each sample that can be packed.
        sources: counts of each source.
        first_rejects: the first few rejected records; those that a filter left out come last.
        rejects_path: the list of all of them, one JSON object a line.
        complete: whether all records were read.
    """

    rows: RecordFile
    sources: tuple[SourceCounts, ...]
    first_rejects: tuple[Reject, ...]
    rejects_path: Path
    complete: bool

    @property
    def records(self) -> int:
        """Return the number of records that were read."""
        return sum(source.records for source in self.sources)

    @property
    def rejects(self) -> dict[str, int]:
        """Return the number of rejected records for each reason."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.rejects)
        return dict(sorted(total.items()))

    @property
    def packable(self) -> int:
        """Return the number of records that can be packed."""
        return self.records - sum(self.rejects.values())


def scan_records(
    sources: Sequence[Annotations],
    settings: EncoderSettings,
    folder: Path,
    *,
    images: Images = Images.HEADER,
    workers: int,
    executor: Executor = "processes",
) -> Scan:
    """Measure all records of ``sources``, or resume.

    Args:
        sources: annotation files.
        settings: of the encoder.
        folder: where rows and rejected records (``rejects.jsonl``, one JSON object a line, in the
            order of the files) are written.
        images: how far images are read.
        workers, executor: as for ``ordered_map``.

    Returns:
        All records; if none of the first ``HOPELESS_RECORDS`` can be used, only those.

    Raises:
        ValueError: a source has other records than its ``length`` says, a file is damaged so that
            its records cannot be counted, or there are more samples than a dataset can have.
    """
    state = read_state(folder, len(sources))
    if not state.complete:
        _scan_rest(sources, settings, folder, state, images, workers, executor)
    if state.complete:
        _check_lengths(sources, state.sources)
    return Scan(
        rows=RecordFile(LocalFiles(folder), state.rows_name, ROW, state.rows),
        sources=tuple(state.sources),
        first_rejects=tuple(state.first_rejects),
        rejects_path=folder / state.rejects_name,
        complete=state.complete,
    )


def _scan_rest(
    sources: Sequence[Annotations],
    settings: EncoderSettings,
    folder: Path,
    state: ScanState,
    images: Images,
    workers: int,
    executor: Executor,
) -> None:
    """Measure the records that a state lacks, and bring it up to date."""
    sizes = [file_state(source.path).size for source in sources]
    tasks = _tasks(sources, sizes, settings, images, state, workers, executor)
    with (
        open(folder / state.rows_name, "ab") as rows,
        open(folder / state.rejects_name, "ab") as rejects,
        Progress("reading", "B", sum(sizes), state.bytes) as progress,
    ):
        rows.truncate(state.rows * ROW.itemsize)
        rejects.truncate(state.rejects_bytes)
        saved = time.monotonic()
        # Kept here, since a mixture has thousands of sources, and tasks are short.
        records = sum(source.records for source in state.sources)
        rejected = records - state.packable
        for measured in ordered_map(measure, tasks, workers, executor):
            rows.write(measured.rows.tobytes())
            lines = reject_lines(measured.rejects)
            rejects.write(lines)
            state.bytes += measured.task.records.size
            state.rows += len(measured.rows)
            state.rejects_bytes += len(lines)
            count_measured(state, measured.task.source, measured.counts, measured.rejects)
            records += measured.counts.records
            rejected += len(measured.rejects)
            progress.add(measured.task.records.size, f"{records} records, {rejected} rejected")
            if state.rows > MOST_SAMPLES:
                raise ValueError(
                    f"more than {MOST_SAMPLES:,} samples, the most that a dataset can have; pack"
                    " the annotation files in several parts, and name all of them in --data.train"
                )
            # Records that a filter leaves out are no reason to give up.
            if not state.rows and records >= HOPELESS_RECORDS:
                unwanted = sum(count_unwanted(source.rejects) for source in state.sources)
                if unwanted >= HOPELESS_RECORDS:
                    return
            if time.monotonic() - saved > SAVE_INTERVAL_SECONDS:
                save_state(folder / STATE_NAME, state, rows, rejects)
                saved = time.monotonic()
        state.complete = True
        save_state(folder / STATE_NAME, state, rows, rejects)


def measure(task: ScanTask) -> Measured:
    """Encode the records of a task, in a worker, and keep their sizes."""
    encoder = build_encoder(task.settings)
    rows = []
    rejects = []
    counts = SourceCounts()
    unread: Counter[str] = Counter()
    extent = task.records
    for raw in open_reader(task.annotations.path).read(
        extent.offset, extent.number, extent.records
    ):
        counts.records += 1
        samples = encoder.measure_raw(raw, task.annotations, source=task.source, images=task.images)
        if isinstance(samples, Reject):
            rejects.append(samples)
            continue
        if samples[0].unread:
            unread.update(samples[0].unread)
        for sample in samples:
            if sample.images:
                counts.images += len(sample.images)
                counts.deep_images += sum(image.deep for image in sample.images)
                counts.turned_images += sum(image.turned for image in sample.images)
            rows.append(
                (
                    raw.offset,
                    raw.number,
                    sample.length,
                    sample.tiles,
                    task.source,
                    sample.difficulty,
                    sample.window,
                )
            )
    if counts.records != extent.records:
        raise ValueError(
            f"{task.annotations.path}: {counts.records} records from number {extent.number} on, but"
            f" {extent.records} when it was opened; the file has changed meanwhile"
        )
    counts.unread = dict(unread.most_common(MOST_UNREAD_KEYS))
    counts.rejects = dict(Counter(reject.reason for reject in rejects))
    return Measured(task=task, rows=np.array(rows, ROW), counts=counts, rejects=rejects)


def _tasks(
    sources: Sequence[Annotations],
    sizes: Sequence[int],
    settings: EncoderSettings,
    images: Images,
    state: ScanState,
    workers: int,
    executor: Executor,
) -> Iterator[ScanTask]:
    """Yield the tasks that a state lacks; ``sizes`` are bytes of the annotation files."""
    files = [
        FileToCut(
            path=source.path,
            records=RECORDS_PER_LARGE_TASK if size > LARGE_FILE_BYTES else RECORDS_PER_TASK,
            share=source.repeat_time,
        )
        for source, size in zip(sources, sizes, strict=True)
    ]
    first, done = first_unfinished(state)
    for number, extents in enumerate(cut_files(files[first:], workers, executor), start=first):
        for extent in extents:
            if done:
                done -= 1
                continue
            yield ScanTask(
                settings=settings,
                annotations=sources[number],
                source=number,
                records=extent,
                images=images,
            )


def _check_lengths(sources: Sequence[Annotations], counts: Sequence[SourceCounts]) -> None:
    """Compare the records of each entry of a meta file with its ``length``."""
    totals: Counter[str] = Counter()
    for source, found in zip(sources, counts, strict=True):
        totals[source.name] += found.records
    for source in sources:
        whole = source.length is not None and source.repeat_time >= 1
        if whole and totals[source.name] != source.length:
            raise ValueError(
                f"--meta: {source.name!r} has {totals[source.name]} records, but its length is"
                f" {source.length}; restore the files, or correct or remove length and repeat the"
                " command"
            )
