"""What a run must remember beside weights and moments to resume as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from megavlm.checkpoint.base_files import Base
from megavlm.config.evaluation import VALID_LOSS
from megavlm.config.former_names import current_name

FILE_NAME = "state.json"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 called the connector projector

_LISTS = ("packs", "indexes", "recent_losses", "skipped_steps", "unreadable_packs")

History = tuple[tuple[int, tuple[str, ...]], ...]
"""Stages whose moments were kept, oldest first: steps of each, and what it trained."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The position of a run.

    The order of the packs is a pure function of the seed and a position, and nothing in training
    draws from a random state, so this is all.

    Args:
        step: steps that are done, skipped ones included.
        consumed: packs that are done, over all ranks and epochs.
        stage: name of the stage that was trained; none in a checkpoint made by conversion.
        tokenizer: fingerprint of the tokenizer of the training packs; none where it is not known.
        packs: how many each folder of training packs has; empty where it is not known.
        indexes: checksum of the index of each of these folders; empty where it is not known.
        valid_loss: validation loss after this very step; none where it was not measured.
        figures: names and values of the tasks after this very step; empty where none was asked.
        history: earlier stages of which moments were kept.
        trained_only: whether the checkpoint holds the trained parameters only.
        base: the files of their base weights.
        skipped: steps whose update was skipped.
        skipped_in_a_row: how many of these are the last steps.
        skipped_steps: their numbers, counted from 1, if parameters are unfrozen on the way.
        recent_losses: of the last steps, if spikes of the loss are looked for.
        unreadable_packs: ids of those that could not be read and were left out, ascending.
        reference: names the weights of the reference model that preferences are compared with;
            empty if there is none, or it is not known.
        format: version of the checkpoint's layout.
    """

    step: int = 0
    consumed: int = 0
    stage: str | None = None
    tokenizer: str | None = None
    packs: tuple[int, ...] = ()
    indexes: tuple[int, ...] = ()
    valid_loss: float | None = None
    figures: tuple[tuple[str, float], ...] = ()
    history: History = ()
    trained_only: bool = False
    base: Base = field(default_factory=Base)
    skipped: int = 0
    skipped_in_a_row: int = 0
    skipped_steps: tuple[int, ...] = ()
    recent_losses: tuple[float, ...] = ()
    unreadable_packs: tuple[int, ...] = ()
    reference: str = ""
    format: int = FORMAT_VERSION

    @property
    def updates(self) -> int:
        """Updates that the moments have seen in this stage."""
        return self.step - self.skipped

    def after(self, packs: int) -> State:
        """Return the state after one more step of ``packs`` packs."""
        return dataclasses.replace(
            self, step=self.step + 1, consumed=self.consumed + packs, valid_loss=None, figures=()
        )

    def figure(self, name: str) -> float | None:
        """Return ``valid_loss`` or a figure of a task; none where it was not measured."""
        return self.valid_loss if name == VALID_LOSS else dict(self.figures).get(name)


def write(state: State, folder: Path) -> None:
    """Write ``state.json``, in the newest format."""
    values = dataclasses.asdict(dataclasses.replace(state, format=FORMAT_VERSION))
    (folder / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n")


def read(folder: Path) -> State:
    """Read ``state.json``.

    Raises:
        ValueError: it is missing, is not JSON, or was written by another version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path}: missing, so {folder} is not a complete checkpoint")
    try:
        values = json.loads(path.read_text())
        history = tuple(
            (int(steps), tuple(map(current_name, trainable)))
            for steps, trainable in values.pop("history", [])
        )
        lists = {name: tuple(values.get(name, ())) for name in _LISTS}
        figures = tuple((str(name), float(value)) for name, value in values.pop("figures", []))
        base = Base.read(values.pop("base", None))
        state = State(**values | lists, figures=figures, history=history, base=base)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the state of a checkpoint ({error})") from error
    if state.format not in READABLE_VERSIONS:
        raise ValueError(
            f"{path}: written in format {state.format}; this version of megavlm reads"
            f" {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    return state
