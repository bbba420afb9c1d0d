"""What a run tells while it trains: console, ``metrics.jsonl`` and trackers.

Observers only: nothing here changes training.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from megavlm.config.schema import Config
from megavlm.train.console import Lines, open_console
from megavlm.train.outbox import Outbox
from megavlm.train.trackers import MLflow, TensorBoard, Tracker, Watched, WeightsAndBiases

FILE_NAME = "metrics.jsonl"
_BLOCK_BYTES = 1 << 16


class Metrics:
    """Writes records of the run; on ranks that do not write, every method but ``log_own`` does
    nothing.

    Args:
        config: the run.
        is_writer: whether this rank writes.
        step: updates that are done when the run starts.
    """

    def __init__(self, config: Config, is_writer: bool, step: int = 0):
        self._writes = is_writer
        self._steps = 0 if config.eval.only else config.training.steps
        self._console = open_console() if is_writer else Lines()
        self._file: FileIO | None = None
        self._is_file_full = False
        self._trackers: list[Tracker] = []
        if not is_writer:
            return
        if config.checkpoint.save:
            self._open_file(Path(config.checkpoint.save))
        if config.logging.tensorboard:
            board = partial(TensorBoard, config, step)
            self._trackers.append(Watched(TensorBoard.name, board, self.log))
        if config.logging.wandb_project:
            wandb = partial(WeightsAndBiases, config, self.log)
            self._trackers.append(Watched(WeightsAndBiases.name, wandb, self.log))
        if config.logging.mlflow:
            self._trackers.append(Outbox(MLflow.name, partial(MLflow, config), self.log))

    def _open_file(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(str(folder / FILE_NAME), "a+")
            _cut_unfinished_line(self._file)
        except OSError as error:
            self.log(f"ERROR: {folder / FILE_NAME}: records are on the console only ({error})")

    def log(self, text: str) -> None:
        """Print a line that every rank has, or the writing one; the writing one prints it."""
        if self._writes:
            self._console.log(text)

    def log_own(self, text: str) -> None:
        """Print a line that this rank has and the writing one may lack, such as what rank 0 finds
        in the save folder: with pipeline parallelism the writing rank is another.
        """
        self._console.log(text)

    def record(
        self,
        step: int,
        values: dict[str, float | str],
        by_source: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """Write one record everywhere.

        Args:
            step: updates that are done.
            values: figures by name; texts go to the console and to the file only.
            by_source: figures of each source of the data, by name, such as ``{"loss": {"chats":
                1.2}}``. In the file and in trackers they are called ``loss/chats``; the console
                shows the first ones, if the sources are few.
        """
        if not self._writes:
            return
        self._console.record(step, self._steps, values, by_source or {})
        values = values | {
            f"{name}/{source}": figure
            for name, figures in (by_source or {}).items()
            for source, figure in figures.items()
        }
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        if self._file is not None:
            finite = {
                name: value if isinstance(value, str) or math.isfinite(value) else None
                for name, value in values.items()
            }
            self._append(json.dumps({"step": step, "time": round(time.time(), 3)} | finite) + "\n")
        for tracker in self._trackers:
            tracker.record(step, numbers)

    def show(self, step: int, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Give trackers the answers to tasks, by task: for each question what ``answers/`` holds of
        it.
        """
        for tracker in self._trackers:
            for task, rows in answers.items():
                tracker.show(step, task, rows)

    def _append(self, line: str) -> None:
        """Add a line to the file, whole or not at all. A full disk does not end the run for it, and
        is told once, until the file can be written again.
        """
        try:
            if not os.fstat(self._file.fileno()).st_nlink:  # somebody removed it
                removed = self._file
                self._file = FileIO(removed.name, "a+")
                removed.close()
            size = os.fstat(self._file.fileno()).st_size
            if self._file.write(line.encode()) < len(line.encode()):
                self._file.truncate(size)
                raise OSError("no space for a whole line")
            self._is_file_full = False
        except OSError as error:
            if not self._is_file_full:
                self.log(
                    f"ERROR: {self._file.name}: the record above is on the console only, and so are"
                    f" the next ones until it can be written ({error})"
                )
            self._is_file_full = True

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # each record was written when it was made
                self._file.close()
        for tracker in self._trackers:
            tracker.close(has_failed=kind is not None)


def _cut_unfinished_line(file: FileIO) -> None:
    """Remove what a power cut left of the last line, so that each line is a whole record."""
    end = file.seek(0, os.SEEK_END)
    newline = -1
    while end and newline < 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1
    file.truncate(end)
