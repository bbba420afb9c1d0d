"""Cross checks of where checkpoints go and come from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megavlm.config import torchrun
from megavlm.config.checks.limits import at_least
from megavlm.config.gone_folders import has_steps
from megavlm.config.schema import Checkpoint

EXPORTED = "exported.json"


def checkpoint_problems(
    checkpoint: Checkpoint, eval_interval: int, steps: int, *, averages: bool
) -> Iterator[str]:
    """Everything about checkpoints that cannot be, or would have no effect, each naming the flag to
    change.

    Args:
        checkpoint: where checkpoints go and come from.
        eval_interval: steps between evaluations.
        steps: of the whole run.
        averages: whether the moving average is exported.
    """
    names = ("save_interval", "save_epochs", "keep", "keep_best")
    yield from at_least(0, "checkpoint", checkpoint, *names)
    yield from _best_problems(checkpoint, eval_interval)
    for name in ("save_epochs", "trained_only"):
        if vars(checkpoint)[name] and not checkpoint.save:
            yield f"--checkpoint.{name} needs --checkpoint.save, the folder for checkpoints"
    if checkpoint.save_interval > 0 and not checkpoint.save:
        yield (
            f"--checkpoint.save_interval {checkpoint.save_interval} needs --checkpoint.save, the"
            " folder for checkpoints; use --checkpoint.save_interval 0 for a run that keeps"
            " nothing"
        )
    yield from _unwritable("--checkpoint.save", checkpoint.save)
    # A run that resumes its own checkpoint does not need what it began with.
    if checkpoint.load and not has_steps(checkpoint.save) and not Path(checkpoint.load).is_dir():
        yield f"--checkpoint.load {checkpoint.load}: no such folder"
    if checkpoint.moments == "keep" and not checkpoint.load:
        yield (
            "--checkpoint.moments keep needs --checkpoint.load, the checkpoint that they come from"
        )
    if checkpoint.weights_only and not checkpoint.load:
        yield (
            "--checkpoint.weights_only needs --checkpoint.load, the checkpoint that they come from"
        )
    elif checkpoint.weights_only and checkpoint.moments == "keep":
        yield (
            "--checkpoint.weights_only and --checkpoint.moments keep exclude each other: moments"
            " are left out, or kept"
        )
    if checkpoint.export_hf and not checkpoint.save:
        yield (
            f"--checkpoint.export_hf {checkpoint.export_hf} needs --checkpoint.save: the model is"
            " exported from the last checkpoint"
        )
    if checkpoint.export_hf and exported_step(checkpoint, averages=averages) != steps:
        yield from _taken(checkpoint.export_hf)
        if torchrun.rank() == 0:  # which alone exports
            yield from _unwritable("--checkpoint.export_hf", checkpoint.export_hf)


def _best_problems(checkpoint: Checkpoint, eval_interval: int) -> Iterator[str]:
    """Report why no best checkpoints can be kept."""
    if checkpoint.keep_best > 0 and checkpoint.trained_only:
        yield (
            f"--checkpoint.keep_best {checkpoint.keep_best}: with --checkpoint.trained_only true"
            " only the last checkpoint is whole, and the best one could not be exported; leave one"
            " out"
        )
    if checkpoint.keep_best > 0 and checkpoint.keep == 0:
        yield (
            f"--checkpoint.keep_best {checkpoint.keep_best} has no effect with --checkpoint.keep 0,"
            " which keeps all"
        )
    elif checkpoint.keep_best > 0 and checkpoint.save_epochs > 0:
        yield (
            f"--checkpoint.keep_best {checkpoint.keep_best} needs an evaluation at each checkpoint,"
            f" and epochs (--checkpoint.save_epochs {checkpoint.save_epochs}) end between them; use"
            " --checkpoint.save_interval"
        )
    elif checkpoint.keep_best > 0 and (
        eval_interval < 1 or checkpoint.save_interval % eval_interval
    ):
        yield (
            f"--checkpoint.keep_best {checkpoint.keep_best} needs an evaluation at"
            " each checkpoint: a --training.eval_interval that divides --checkpoint.save_interval"
            f" {checkpoint.save_interval}; it is {eval_interval}"
        )


def _unwritable(flag: str, name: str) -> Iterator[str]:
    """Say why a folder cannot be written to, or made; nothing if there is no name."""
    place = Path(name).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if name and not place.is_dir():
        yield f"{flag} {name}: {place} is a file, or a link to nothing; name a folder"
    elif name and not os.access(place, os.W_OK | os.X_OK):
        yield f"{flag} {name}: nothing can be written in {place}; name another folder"


def _taken(export: str) -> Iterator[str]:
    """Name a folder for the exported model that holds something already."""
    target = Path(export)
    if target.is_dir() and any(target.iterdir()):
        yield (
            f"--checkpoint.export_hf {export}: exists already and is not an empty folder; name"
            " another"
        )


def exported_step(checkpoint: Checkpoint, *, averages: bool) -> int | None:
    """Return the number of steps of the run whose model is already in ``export_hf``, as the run in
    the save folder noted it; none if it did not.

    Args:
        checkpoint: names both folders.
        averages: whether the moving average is asked for.
    """
    try:
        noted = json.loads((Path(checkpoint.save) / EXPORTED).read_text())
        is_there = (Path(checkpoint.export_hf) / "config.json").is_file()
        is_there = is_there and noted.get("averages", False) == averages
        is_it = noted["folder"] == str(Path(checkpoint.export_hf).resolve())
        return noted["step"] if is_there and is_it else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
