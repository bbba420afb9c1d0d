"""The scoring of a dataset: records are read once, in tasks that worker processes take; what is
done stays in ``OUT.partial`` when the job is stopped, and the same command resumes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.packing.executors import ordered_map
from megavlm.data.packing.file_ranges import FileToCut, cut_files
from megavlm.data.packing.job_state import SHOWN_REJECTS, reject_lines, save_state
from megavlm.data.packing.scan import HOPELESS_RECORDS, SAVE_INTERVAL_SECONDS
from megavlm.data.packing.work_folder import partial_folder, publish
from megavlm.data.records import scores
from megavlm.io import atomic
from megavlm.io.progress import Progress
from megavlm.io.remote import file_state
from megavlm.score import worker
from megavlm.score.duplicates import mark_near_duplicates
from megavlm.score.places import find_places
from megavlm.score.report import Report, Tally, make_report
from megavlm.score.settings import Job
from megavlm.score.state import (
    IMAGES_NAME,
    ROW,
    ROWS_NAME,
    STATE_NAME,
    UNSCORED_NAME,
    ScoringState,
    read_state,
)
from megavlm.score.worker import Scored, ScoreTask

RECORDS_PER_TASK = 256
_CODES_NAME = "codes.bin"
_MARKED_NAME = "marked.bin"
_ROWS_AT_ONCE = 2**20


def score_dataset(job: Job) -> Report:
    """Score a dataset, or resume, and return its figures. The folder ``job.out`` appears when it is
    complete, not before.

    Raises:
        FileNotFoundError: the model, its tokenizer or an annotation file does not exist.
        FileExistsError: ``--out`` already holds something, or ``OUT.partial`` something else than
            this job.
        ValueError: a setting that cannot work, a model without embeddings, an annotation file whose
            records cannot be counted, or no record with a score.
    """
    start = time.monotonic()
    job.check()
    identity = job.identity()
    with partial_folder(job.partial, identity, flag=f"--out {job.out}") as folder:
        state = read_state(folder, len(job.sources), _embedding_bytes(job))
        if not state.complete:
            try:
                _score_rest(job, folder, state)
            finally:
                worker.close(job.for_workers)
        if not state.rows:
            raise _nothing_scored(job, state)
        report = _publish(job, identity, folder, state, start)
    return report


def _score_rest(job: Job, folder: Path, state: ScoringState) -> None:
    """Score the records that a state lacks, and bring it up to date."""
    total = sum(file_state(source.path).size for source in job.sources)
    with (
        open(folder / ROWS_NAME, "ab") as rows,
        open(folder / IMAGES_NAME, "ab") as images,
        open(folder / UNSCORED_NAME, "ab") as unscored,
        Progress("scoring", "B", total, state.bytes) as progress,
    ):
        files = (rows, images, unscored)
        rows.truncate(state.rows * ROW.itemsize)
        images.truncate(state.rows * _embedding_bytes(job))
        unscored.truncate(state.unscored_bytes)
        saved = time.monotonic()
        tasks = islice(_tasks(job), state.tasks, None)
        for found in ordered_map(worker.score, tasks, job.processes, job.executor):
            rows.write(found.rows.tobytes())
            images.write(found.images.tobytes())
            lines = reject_lines(found.rejects)
            unscored.write(lines)
            _count(state, found, len(lines))
            progress.add(
                found.task.records.size,
                f"{state.records} records, {state.records - state.rows} without a score",
            )
            if not state.rows and state.records >= HOPELESS_RECORDS:
                raise _nothing_scored(job, state)
            if time.monotonic() - saved > SAVE_INTERVAL_SECONDS:
                save_state(folder / STATE_NAME, state, *files)
                saved = time.monotonic()
        state.complete = True
        save_state(folder / STATE_NAME, state, *files)


def _embedding_bytes(job: Job) -> int:
    """Return the bytes that are kept of the embedding of each record's images."""
    size = job.towers.architecture.contrastive.size * np.dtype(np.float16).itemsize
    return size if job.keeps_embeddings else 0


def _tasks(job: Job) -> Iterator[ScoreTask]:
    """Cut the annotation files into tasks."""
    settings = job.for_workers
    files = [FileToCut(path=source.path, records=RECORDS_PER_TASK) for source in job.sources]
    for number, extents in enumerate(cut_files(files, job.processes, job.executor)):
        for extent in extents:
            yield ScoreTask(
                settings=settings, annotations=job.sources[number], source=number, records=extent
            )


def _count(state: ScoringState, found: Scored, unscored_bytes: int) -> None:
    """Add the result of a task to a state."""
    state.tasks += 1
    state.bytes += found.task.records.size
    state.rows += len(found.rows)
    state.unscored_bytes += unscored_bytes
    state.first_rejects += found.rejects[: SHOWN_REJECTS - len(state.first_rejects)]
    source = state.sources[found.task.source]
    source.records += found.task.records.records
    source.last_line = found.last_line
    source.scored += len(found.rows)
    for name, count in found.reasons.items():
        source.reasons[name] = source.reasons.get(name, 0) + count


def _nothing_scored(job: Job, state: ScoringState) -> ValueError:
    """Return the error for a dataset without a score."""
    if not state.records:
        names = ", ".join(source.path for source in job.sources)
        return ValueError(f"no records in {names}")
    lines = "".join(f"\n  {one}" for one in state.first_rejects)
    return ValueError(
        f"none of {state.records} records has a score; repair them, name the folder of their images"
        f" with --root, and remove {job.partial}. The first:{lines}"
    )


def _publish(
    job: Job, identity: dict[str, Any], folder: Path, state: ScoringState, start: float
) -> Report:
    """Write the arrays, the report and ``scores.json``, and give the folder its name."""
    marked = _mark(job, folder, state.rows)
    tally = Tally(len(job.sources))
    places = find_places(_images(job, folder, state.rows)) if job.places else None
    _write_arrays(folder, state, marked, places, tally)
    near = None if marked is None else int(np.count_nonzero(marked))
    report = make_report(
        tally,
        state.sources,
        [source.name for source in job.sources],
        out=job.out,
        duplicates=job.duplicates,
        near_duplicates=near,
        seconds=time.monotonic() - start,
    )
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
    atomic.write_text(folder / scores.FILE_NAME, _facts(job, identity, state, near))
    del marked
    publish(folder, Path(job.out), (ROWS_NAME, IMAGES_NAME, _MARKED_NAME, STATE_NAME))
    return report


def _mark(job: Job, folder: Path, rows: int) -> np.ndarray | None:
    """Return which rows have an image that was there before, bool [rows]; None if nobody asks."""
    if not job.duplicates:
        return None
    images = _images(job, folder, rows)
    marked = np.memmap(folder / _MARKED_NAME, bool, "w+", shape=(rows,))
    mark_near_duplicates(images, job.duplicates, marked, folder / _CODES_NAME)
    return marked


def _images(job: Job, folder: Path, rows: int) -> np.ndarray:
    """Return the embeddings of the images, float16 [rows, E]."""
    size = job.towers.architecture.contrastive.size
    return np.memmap(folder / IMAGES_NAME, np.float16, "r", shape=(rows, size))


def _write_arrays(
    folder: Path,
    state: ScoringState,
    marked: np.ndarray | None,
    places: np.ndarray | None,
    tally: Tally,
) -> None:
    """Write the scores of each annotation file, which of its records are marked, and the places of
    all.
    """
    rows = np.memmap(folder / ROWS_NAME, ROW, "r", shape=(state.rows,))
    # What rows have, and what records without a row get.
    columns = {"scores": (rows["score"], np.float32(np.nan))}
    if marked is not None:
        columns["duplicates"] = (marked, np.bool_(False))
    if places is not None:
        columns["places"] = (places, np.int64(-1))
    first = 0
    for number, source in enumerate(state.sources):
        end = first + source.scored
        for name, (values, nothing) in columns.items():
            path = folder / scores.array_name(number, name)
            array = _new_array(path, nothing, source.last_line)
            for start in range(first, end, _ROWS_AT_ONCE):
                some = slice(start, min(start + _ROWS_AT_ONCE, end))
                array[rows["line"][some] - 1] = values[some]
                if name == "scores":
                    tally.add(number, values[some])
        first = end


def _new_array(path: Path, value: np.generic, length: int) -> np.ndarray:
    """Return a new array in a file, with one value everywhere."""
    if not length:  # which cannot be mapped
        np.save(path, np.full(0, value))
        return np.full(0, value)
    found = np.lib.format.open_memmap(path, "w+", value.dtype, (length,))
    found[:] = value
    return found


def _facts(job: Job, identity: dict[str, Any], state: ScoringState, near: int | None) -> str:
    """Return the content of ``scores.json``, with the files as they were when the job began."""
    sources = [
        {
            "path": scores.full_path(source["path"]),
            "bytes": source["bytes"],
            "modified": source["modified"],
            "records": read.records,
            "scored": read.scored,
        }
        for source, read in zip(identity["sources"], state.sources, strict=True)
    ]
    content = json.dumps(identity, sort_keys=True)
    facts = {
        "format": scores.FORMAT,
        "version": scores.VERSION,
        # Packs know scores by this file: other weights, tokens or files are other scores.
        "identity": hashlib.sha256(content.encode()).hexdigest(),
        "score": "cosine of the embeddings of image and text",
        "model": job.model,
        "template": job.towers.usage.template,
        "tiling": job.towers.usage.tiling,
        "precision": job.precision,
        "duplicates": None if near is None else {"cosine": job.duplicates, "records": near},
        "places": job.places,
        "sources": sources,
    }
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
