"""Folders that a model was made of and that are gone: a run that resumes does not need them, since
its checkpoint knows the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.models import MODELS
from megavlm.config.schema import Init


def has_steps(save: str) -> bool:
    """Return whether a save folder holds checkpoints of a run."""
    return bool(save) and any(Path(save).glob("step_*"))


def gone_folders(model: str, init: Init) -> list[str]:
    """Return what a command names that is not there, with its flag.

    Args:
        model: of ``--model``; may be empty.
        init: the parts.
    """
    named = {"model": "" if model in MODELS else model}
    named |= {f"init.{name}": folder for name, folder in vars(init).items()}
    return [f"--{key} {name}" for key, name in named.items() if name and not Path(name).is_dir()]


def own_configs(save: str, stage: str) -> Iterator[Path]:
    """Yield the configurations of a run's checkpoints, the newest first; of a command of several
    stages, those of the stage before those of others.
    """
    for pattern in ("step_*", f"stage_{stage}/step_*", "stage_*/step_*"):
        yield from sorted(Path(save).glob(f"{pattern}/config.yaml"), reverse=True)
