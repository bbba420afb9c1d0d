"""TensorBoard and Weights & Biases, as observers: neither can end a run, and each continues its
records of the run when it resumes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megavlm.config.cli import to_yaml
from megavlm.config.schema import Config
from megavlm.io import atomic

_RUN_ID = "megavlm_run_id"
_INIT_SECONDS = 60.0


class Tracker(Protocol):
    """Gets the figures of a run."""

    name: str

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def close(self, *, has_failed: bool) -> None:
        """Write what is left; ``has_failed`` tells how the run ended."""


class TensorBoard:
    """Event files in the save folder.

    Args:
        config: the run.
        step: updates that are done; what an earlier attempt recorded of later ones is hidden.
    """

    name = "TensorBoard"

    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = str(Path(config.checkpoint.save) / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one each time that the training run resumes.

    Args:
        config: the run.
        say: told if the server cannot be reached.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, say: Callable[[str], None]):
        import wandb
        import yaml

        settings: dict[str, Any] = dict(
            project=config.logging.wandb_project,
            name=config.logging.run_name or None,
            dir=config.checkpoint.save or None,
            config=yaml.safe_load(to_yaml(config)),
            id=_run_id(config.checkpoint.save),
        )
        mode = config.logging.wandb_mode
        try:
            if mode == "online":
                settings["settings"] = wandb.Settings(init_timeout=_INIT_SECONDS)
                self._run = wandb.init(**settings, mode=mode, resume="allow")
            else:
                self._run = wandb.init(**settings, mode=mode)
        except Exception as error:  # its own, the network's and others, by version
            if mode == "offline" or not config.checkpoint.save:
                raise
            say(
                f"WARNING: Weights & Biases cannot be reached ({_one_line(error)}); its records go"
                f" to {config.checkpoint.save}/wandb, for wandb sync"
            )
            self._run = wandb.init(**settings, mode="offline")
        # Steps may be trained again after a resume, which wandb's own step counter refuses.
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        self._run.log({**numbers, "step": step})

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        self._run.finish(exit_code=int(has_failed))


def _run_id(save: str) -> str:
    """Return the run's name for Weights & Biases, which the save folder keeps."""
    if not save:
        return uuid.uuid4().hex[:8]
    path = Path(save) / "wandb" / _RUN_ID
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, uuid.uuid4().hex[:8])
    return path.read_text().strip()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Watched:
    """A tracker that ends with a warning instead of ending the run.

    Args:
        name: in the warning.
        make: makes the tracker.
        say: told of the failure, once.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]):
        self._name = name
        self._say = say
        self._tracker: Tracker | None = None
        self._attempt(lambda: self._start(make))

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.record(step, numbers))

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.close(has_failed=has_failed))

    def _start(self, make: Callable[[], Tracker]) -> None:
        self._tracker = make()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training continues
            self._tracker = None
            self._say(
                f"WARNING: {self._name} gets no more figures ({_one_line(error)});"
                " training continues"
            )
