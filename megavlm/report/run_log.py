"""What a run has written about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megavlm.checkpoint import directory
from megavlm.config.yaml_file import flat

_FILE = "metrics.jsonl"
# A record that every start of a run begins with.
_START = "trainable_parameters"
_NO_FIGURES = ("step", "time", _START)
_SKIPPED = "skipped_steps"

Points = list[tuple[int, float]]
"""Steps and values, in the order of the steps."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run.

    Args:
        step: updates that were done.
        reached: updates that had been done before the run was started again; 0 at the first start.
        time: seconds since 1970.
    """

    step: int
    reached: int
    time: float


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a run beside its steps.

    Args:
        time: seconds since 1970.
        text: for people.
    """

    time: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells it.

    Args:
        name: for people.
        folder: its save folder.
        figures: by name. Of steps that were done again after a resume, what was done last.
        starts: the first one, and the resumes.
        skips: steps that had no update, as far as they were recorded.
        saves: checkpoints that are still there.
        settings: options and values, of the newest checkpoint; empty if there is none.
        answers: folder of the newest answers to tasks; none if there are none.
    """

    name: str
    folder: Path
    figures: Mapping[str, Points]
    starts: tuple[Start, ...]
    skips: tuple[Event, ...]
    saves: tuple[Event, ...]
    settings: Mapping[str, Any]
    answers: Path | None


@dataclass
class _Reading:
    figures: dict[str, Points] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    skips: list[Event] = field(default_factory=list)
    reached: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if _START in record:
            self.starts.append(Start(step=step, reached=self.reached, time=record["time"]))
            for name, points in self.figures.items():
                self.figures[name] = [point for point in points if point[0] <= step]
        self.reached = max(self.reached, step)
        before = self.figures.get(_SKIPPED)
        skipped = record.get(_SKIPPED, 0) - (before[-1][1] if before else 0)
        if skipped > 0:
            text = f"skipped {skipped:,} steps up to step {step:,}"
            self.skips.append(Event(time=record["time"], text=text))
        for name, value in record.items():
            if name not in _NO_FIGURES and isinstance(value, (int, float)):
                points = self.figures.setdefault(name, [])
                if points and points[-1][0] == step:
                    points.pop()
                points.append((step, value))


def read_run(folder: Path, name: str = "") -> Run:
    """Read the save folder of a run.

    Args:
        folder: of the run.
        name: for people; empty: the folder's.

    Raises:
        ValueError: there is no run, or a line of its figures is damaged.
    """
    path = folder / _FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: no figures of a run are there ({error.strerror})") from None
    reading = _Reading()
    for number, line in enumerate(lines, 1):
        try:
            reading.add(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a record of a run ({error})") from None
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        figures=reading.figures,
        starts=tuple(reading.starts),
        skips=tuple(reading.skips),
        saves=tuple(_saves(folder)),
        settings=_settings(folder),
        answers=max((folder / "answers").glob("step-*"), default=None),
    )


def newest_settings(folder: Path) -> Path | None:
    """Return the settings in the newest checkpoint of a run; none: there are none."""
    paths = (step / "config.yaml" for step in directory.candidates(folder))
    return next((path for path in paths if path.is_file()), None)


def _saves(folder: Path) -> Iterator[Event]:
    """Yield the checkpoints that are still there, with the times of their last files."""
    for step in directory.candidates(folder):
        if step.is_dir():
            times = [path.stat().st_mtime for path in step.iterdir()]
            number = directory.step_of(step)
            yield Event(
                time=max(times, default=0.0), text=f"saved the checkpoint of step {number:,}"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """Return the options of the newest checkpoint, with dots in their names."""
    path = newest_settings(folder)
    if path is None:
        return {}
    return dict(flat(yaml.safe_load(path.read_text(encoding="utf-8"))))
