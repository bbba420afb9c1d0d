"""The export of a run that is done."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megavlm.checkpoint.train_state import State
from megavlm.config.checks.saving import EXPORTED, exported_step
from megavlm.config.schema import Config
from megavlm.convert.hf import convert
from megavlm.io import atomic
from megavlm.parallel.process_groups import Groups
from megavlm.train import resume
from megavlm.train.resume import Start


class ExportError(RuntimeError):
    """A model that could not be exported at the end of a run."""


def export_finished(config: Config, state: State, start: Start, groups: Groups) -> None:
    """Export the model of a run that is done, if it is asked for and not done already."""
    files = config.checkpoint
    if not files.export_hf or state.step < config.training.steps or groups.rank:
        return
    if exported_step(files, averages=config.ema.export) == config.training.steps:
        atomic.remove_lock(Path(files.export_hf))
        print(f"{files.export_hf}: holds the model of this run already", flush=True)
        return
    # A run with nothing to do has saved nothing. Steps of another stage do not count.
    has_saved = resume.first_step(config, start) < state.step
    folder = files.save if has_saved else start.folder
    # So that the same command again is no mistake.
    noted = {
        "folder": str(Path(files.export_hf).resolve()),
        "step": config.training.steps,
        "averages": config.ema.export,
    }

    def note() -> None:
        atomic.write_text(Path(files.save) / EXPORTED, json.dumps(noted) + "\n")

    begun = time.monotonic()
    try:
        # Noted first: killed in the moment between, the export would be in the way of the same
        # command. A note of a folder that is not there counts for nothing.
        convert.export(
            folder,
            files.export_hf,
            averages=config.ema.export,
            flag="--checkpoint.export_hf",
            before_named=note,
        )
    except (OSError, ValueError) as error:  # such as a folder that somebody has filled meanwhile
        raise ExportError(
            f"--checkpoint.export_hf {files.export_hf}: the model could not be exported ({error});"
            f" the checkpoint is in {folder}, and the same command exports it when that is mended"
        ) from error
    print(f"exported {files.export_hf} in {time.monotonic() - begun:.1f} s", flush=True)
