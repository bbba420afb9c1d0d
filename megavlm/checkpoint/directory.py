"""A run's save folder: which checkpoints are in it, how one gets in, and which ones leave.

A checkpoint grows under a name of its own, which no other attempt uses: writers that outlive a
killed run write where nobody looks. Only a complete one is renamed to ``step_00000100``, and only
then ``latest`` moves.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

from megavlm.checkpoint import lock, train_state
from megavlm.config.evaluation import VALID_LOSS
from megavlm.config.schema import REFERENCE_FOLDER
from megavlm.io import atomic

LATEST = "latest"
_STEP = "step_"
_GROWING = ".growing_"
_LEAVING = ".leaving_"
_OWN = {
    LATEST,
    REFERENCE_FOLDER,
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "mlruns",
    "exported.json",
    "answers",
}


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{_STEP}{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a folder's name; None if there is none."""
    digits = folder.name.removeprefix(_STEP)
    return int(digits) if folder.name.startswith(_STEP) and digits.isdigit() else None


def growing_name(step: int) -> str:
    """Return a new name for a checkpoint that is being written, another one at each call."""
    return f"{_GROWING}{step_name(step)}_{uuid.uuid4().hex[:8]}"


def candidates(root: Path) -> list[Path]:
    """Checkpoints to resume from, the best choice first: the one that ``latest`` names, whether or
    not it is there, then those before it.

    Where ``latest`` is missing or names nothing that a checkpoint could be called, all of them,
    newest first.
    """
    there = sorted(_steps(root), key=step_of, reverse=True)
    try:
        named = root / (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        named = root
    newest = step_of(named)
    if newest is None:
        return there
    return [named, *(folder for folder in there if step_of(folder) < newest)]


def _steps(root: Path) -> list[Path]:
    """Return what is called as a checkpoint in a save folder."""
    return [folder for folder in root.glob(f"{_STEP}*") if step_of(folder) is not None]


def is_own(entry: Path) -> bool:
    """Whether a file or folder in a save folder is one that a run writes there."""
    starts = (_STEP, _GROWING, _LEAVING, f".{LATEST}", lock.FILE_NAME)
    return entry.name in _OWN or entry.name.startswith(starts) or atomic.is_partial(entry)


def clean(root: Path) -> list[str]:
    """Remove what a run that was killed left behind, and return the names."""
    left = [
        entry
        for entry in sorted(root.iterdir())
        if entry.name.startswith((_GROWING, _LEAVING, f".{LATEST}")) or atomic.is_partial(entry)
    ]
    for entry in left:
        _remove(entry, ignore_errors=True)
    return [entry.name for entry in left]


def _remove(entry: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a folder with all that is in it, or a link, but not what a link leads to: a
    checkpoint may have been moved to another disk.
    """
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=ignore_errors)
    else:
        entry.unlink(missing_ok=True)


def publish(growing: Path, target: Path, flushed: Collection[str] = ()) -> None:
    """Give a complete checkpoint its name, then move ``latest``, so that a power cut at any moment
    leaves a whole one named.

    Args:
        growing: the checkpoint.
        target: with its name.
        flushed: files in it that are on the disk already, as for ``atomic.sync_tree``.
    """
    atomic.sync_tree(growing, flushed)
    before = _set_aside(target) if target.exists() else None
    atomic.rename(growing, target)
    atomic.write_text(target.parent / LATEST, target.name + "\n")
    if before is not None:
        _remove(before, ignore_errors=True)


def drop_old(
    root: Path, published: Path, keep: int, keep_best: int, best_by: str = VALID_LOSS
) -> list[str]:
    """Remove checkpoints, but for the newest and the best ones. What is newer than ``published`` is
    of another course of the run and stays.

    Args:
        root: the save folder.
        published: the newest checkpoint of this run.
        keep: newest ones to keep; 0: all.
        keep_best: ones to keep beside them.
        best_by: those with the lowest validation loss, or with the highest figure of a task.

    Returns:
        Why some could not be removed, a line each; they stay, or a part of them does.
    """
    if not keep:
        return []
    newest = step_of(published)
    mine = sorted((one for one in _steps(root) if step_of(one) <= newest), key=step_of)
    sign = 1 if best_by == VALID_LOSS else -1
    ranked = sorted(
        (sign * value, folder) for folder in mine if (value := _figure(folder, best_by)) is not None
    )
    spared = {*mine[-keep:], *(folder for _, folder in ranked[:keep_best])}
    problems = []
    for folder in mine:
        if folder not in spared:
            try:
                _drop(folder)
            except OSError as error:  # such as a file that a client of NFS still has open
                problems.append(f"{type(error).__name__}: {error}")
    return problems


def _figure(folder: Path, name: str) -> float | None:
    try:
        value = train_state.read(folder).figure(name)
        return value if value is not None and math.isfinite(value) else None
    except (ValueError, OSError):
        return None


def _drop(folder: Path) -> None:
    """Rename, then remove: half a checkpoint never has a checkpoint's name."""
    _remove(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Give a checkpoint the name of one that is being removed, and return it."""
    leaving = folder.with_name(f"{_LEAVING}{folder.name}_{uuid.uuid4().hex[:8]}")
    os.replace(folder, leaving)
    return leaving
