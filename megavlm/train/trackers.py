"""TensorBoard, Weights & Biases and MLflow, as observers: none can end a run, and each continues
its records of the run when it resumes. The first two write files and send them on by themselves;
MLflow's calls wait for its server, so an ``Outbox`` makes them.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megavlm.config.cli import to_settings
from megavlm.config.schema import Config
from megavlm.config.yaml_file import flat
from megavlm.io import atomic

_RUN_ID = "megavlm_run_id"
_INIT_SECONDS = 60.0
# Answers of a task that Weights & Biases shows, with their pictures.
_SHOWN_ANSWERS = 8
# MLflow takes values of a setting up to this length, and so many settings at once.
_LONGEST_VALUE = 500
_MOST_VALUES = 100


class Tracker(Protocol):
    """Gets the figures of a run."""

    name: str

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def show(self, step: int, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the answers to a task: for each question what ``answers/`` holds of it; most
        trackers show nothing of them.
        """

    def close(self, *, has_failed: bool) -> None:
        """Write what is left; ``has_failed`` tells how the run ended."""


class TensorBoard(Tracker):
    """Event files in the save folder.

    Args:
        config: the run.
        step: updates that are done; what an earlier attempt recorded of later ones is hidden, and
            all that it recorded if the run begins anew.
    """

    name = "TensorBoard"

    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = str(Path(config.checkpoint.save) / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else 0)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, the same one each time that the training run resumes.

    Args:
        config: the run.
        log: told if the server cannot be reached.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, log: Callable[[str], None]):
        import wandb

        self._wandb = wandb
        self._log = log
        settings: dict[str, Any] = dict(
            project=config.logging.wandb_project,
            name=config.logging.run_name or None,
            dir=config.checkpoint.save or None,
            config=to_settings(config),
            id=_run_id(config.checkpoint.save, "wandb"),
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
            log(
                f"WARNING: Weights & Biases cannot be reached ({one_line(error)}); its records go"
                f" to {config.checkpoint.save}/wandb, for wandb sync"
            )
            self._run = wandb.init(**settings, mode="offline")
        # Steps may be trained again after a resume, which wandb's own step counter refuses.
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        self._run.log({**numbers, "step": step})

    def show(self, step: int, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show pictures of the first questions, with question, answer and truth below."""
        shown = [row for row in rows if row["image"]][:_SHOWN_ANSWERS]
        try:
            pictures = [self._wandb.Image(row["image"][0], caption=_caption(row)) for row in shown]
        except Exception as error:  # a picture that is gone, or that it cannot read: curves go on
            self._log(f"WARNING: the pictures of {task} are not shown ({one_line(error)})")
            return
        if pictures:
            self._run.log({f"answers/{task}": pictures, "step": step})

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        self._run.finish(exit_code=int(has_failed))


class MLflow(Tracker):
    """A run of MLflow, the same one each time that the training run resumes.

    Args:
        config: the run.
    """

    name = "MLflow"

    def __init__(self, config: Config):
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            address = (Path(config.checkpoint.save) / "mlruns").resolve().as_uri()
            # It keeps a store of files for who asks for it by name.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # Its own patience with a silent server is a quarter of an hour, which a run that has ended
        # would wait for.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=address)
        found = self._client.get_experiment_by_name(config.logging.mlflow)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(config.logging.mlflow)
        )
        own = _run_id(config.checkpoint.save, "mlruns")
        known = self._client.search_runs([experiment], f"tags.{_RUN_ID} = '{own}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        name = config.logging.run_name or None
        self._run = self._client.create_run(
            experiment, tags={_RUN_ID: own}, run_name=name
        ).info.run_id
        settings = [
            Param(key, str(value)[:_LONGEST_VALUE]) for key, value in flat(to_settings(config))
        ]
        for start in range(0, len(settings), _MOST_VALUES):
            self._client.log_batch(self._run, params=settings[start : start + _MOST_VALUES])

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        now = int(time.time() * 1000)
        # It refuses other characters in names, which are the user's; and a store of files has no
        # "loss" beside "loss/chats".
        metrics = [
            self._metric(re.sub(r"[^\w\-. ]", "_", name.replace("/", ".")), value, now, step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, has_failed: bool) -> None:
        """Write what is left."""
        self._client.set_terminated(self._run, "FAILED" if has_failed else "FINISHED")


def _run_id(save: str, tracker: str) -> str:
    """Return the run's name for a tracker, which its folder in the save folder keeps."""
    if not save:
        return uuid.uuid4().hex[:8]
    path = Path(save) / tracker / _RUN_ID
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, uuid.uuid4().hex[:8])
    return path.read_text().strip()


def _caption(row: Mapping[str, Any]) -> str:
    """Write a question, the answer to it, and what is right, as a line each."""
    right = " or ".join(dict.fromkeys(row["answers"]))
    return f"{row['question']}\nanswer: {row['prediction']}\nright: {right}"


def one_line(error: Exception) -> str:
    """Write what went wrong, with its kind, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class Watched(Tracker):
    """A tracker that ends with a warning instead of ending the run.

    Args:
        name: in the warning.
        make: makes the tracker.
        log: told of the failure, once.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], log: Callable[[str], None]):
        self._name = name
        self._log = log
        self._tracker: Tracker | None = None
        self._attempt(lambda: self._start(make))

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures of a step."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.record(step, numbers))

    def show(self, step: int, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the answers to a task."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.show(step, task, rows))

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
            self._log(
                f"WARNING: {self._name} gets no more figures ({one_line(error)});"
                " training continues"
            )
