"""What a step's folder holds, and which step of a save folder to read: one reader for training and
conversion.

A step's folder holds ``shards/`` (megatron-core's distributed checkpoint), ``config.yaml``,
``manifest.json`` and ``tokenizer/`` of the training set, ``state.json``, and ``checksums.json`` of
all the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint import checksums, directory, train_state
from megavlm.checkpoint.train_state import State
from megavlm.config.cli import from_yaml
from megavlm.config.schema import Config

CONFIG_NAME = "config.yaml"
SHARDS = "shards"
TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Args:
        folder: the folder of the step.
        config: the run that wrote it.
        state: where that run was.
    """

    folder: Path
    config: Config
    state: State


def find(path: str | Path) -> Checkpoint | None:
    """Read the checkpoint at ``path``, the folder of a step or a save folder (then the step that
    ``latest`` names, or the newest if ``latest`` is absent or empty).

    Returns:
        The checkpoint; None if a save folder holds none yet.

    Raises:
        ValueError: the folder is incomplete, damaged, of another format, or holds trained
            parameters only.
    """
    folder = Path(path)
    if not (folder / train_state.FILE_NAME).is_file():
        steps = directory.candidates(folder)
        if not steps:
            return None
        folder = steps[0]
    found = read(folder)
    if found.state.trained_only:
        raise ValueError(
            f"{folder}: holds trained parameters only (--checkpoint.trained_only), for its own run"
            " to resume from; the last checkpoint of that run is whole"
        )
    return found


def find_given(path: str | Path) -> Checkpoint:
    """``find`` what ``--load`` of a tool names; raises FileNotFoundError if no checkpoint is
    there.
    """
    found = find(path)
    if found is None:
        raise FileNotFoundError(
            f"--load {path}: no checkpoint is there"
            + (runs_inside(path) or "; name the folder of a step or of a run")
        )
    return found


def runs_inside(path: str | Path) -> str:
    """Name the save folders in a folder that is none itself, such as that of a command of several
    stages, for an error; empty if there are none.
    """
    found = [str(folder) for folder in sorted(Path(path).glob("*")) if directory.candidates(folder)]
    return f"; it holds the runs {', '.join(found)}: name one of them" if found else ""


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint of one step; its small files are compared with their checksums, its
    shards are not touched.

    Raises:
        ValueError: the folder is incomplete, damaged, or of another format.
    """
    state = train_state.read(folder)
    checksums.check_small_files(folder)
    path = folder / CONFIG_NAME
    try:
        return Checkpoint(folder=folder, config=from_yaml(path), state=state)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, so {folder} is not a complete checkpoint") from None
