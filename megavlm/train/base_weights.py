"""The base weights of a checkpoint that holds trained parameters only: those that its run began
with. They are known by the content of their files, wherever these are now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megavlm.checkpoint import base_files, step_folder
from megavlm.checkpoint.base_files import Base
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.schema import Config, Init
from megavlm.convert.hf import convert, from_parts
from megavlm.train import resume
from megavlm.train.architecture_differences import architecture_differences
from megavlm.train.resume import DamagedError, Start


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """Base weights that were found.

    Args:
        start: to fill the chunks from.
        folders: that hold them.
    """

    start: Start
    folders: list[Path]


def find(config: Config, start: Start) -> BaseWeights | None:
    """Find the base weights of a checkpoint of trained parameters: at the folders that the command
    names, where they were, or at the same path relative to the save folder. No file of weights is
    read.

    Raises:
        ValueError: they are nowhere, or do not fit the model, or the command names others.
    """
    if not isinstance(start, Checkpoint) or not start.state.trained_only:
        return None
    base = start.state.base
    if base.folders and not base.files:
        raise ValueError(
            f"{start.folder}: holds trained parameters only, and was written by an earlier version,"
            " which noted too little of what lies below them; train from"
            f" {', '.join(base.folders)} again"
        )
    folders = _locate(config, start, f"{start.folder}: holds trained parameters only", "")
    return BaseWeights(start=_opened(start, folders), folders=folders)


def check(config: Config, start: Start) -> None:
    """Make sure that the base weights are there which a run needs, or its checkpoints to come.

    Raises:
        ValueError: they are not, or as of ``find``.
    """
    if find(config, start) is None and _is_kept(config, start):
        _locate_again(config, start)


def _is_kept(config: Config, start: Start) -> bool:
    """Return whether checkpoints to come hold trained parameters only, and have the base weights of
    the checkpoint that is resumed. A later stage begins with what the stage before it ended with,
    not with its base weights.
    """
    return config.checkpoint.trained_only and resume.needs_base(config, start)


def _locate_again(config: Config, start: Checkpoint) -> list[Path]:
    """Return the folders with the base weights of a run that resumes from a checkpoint of all
    weights, and whose next checkpoints will hold trained parameters only; errors as of ``_locate``.
    """
    return _locate(
        config,
        start,
        "--checkpoint.trained_only: checkpoints to come would hold trained parameters only",
        "; or leave --checkpoint.trained_only out",
    )


def _locate(config: Config, start: Checkpoint, why: str, otherwise: str) -> list[Path]:
    """Return the folders that hold the base weights of a checkpoint.

    Args:
        config: the run.
        start: the checkpoint.
        why: they are needed.
        otherwise: what to do instead of naming them.

    Raises:
        ValueError: they are nowhere, or the command names others.
    """
    named = _named(config)
    tried: dict[str, str] = {}
    for folders in _places(config, start):
        name = ", ".join(map(str, folders))
        tried[name] = tried.get(name) or base_files.difference(start.state.base, folders)
        if not tried[name]:
            return folders
        if folders == named and _asks_for_others(config, start):
            flag = "--checkpoint.load" if config.checkpoint.load else "--init"
            listed = "\n  ".join(tried.values())
            raise ValueError(
                f"{flag} {name}: these are not the weights that the run of {start.folder} began"
                f" with:\n  {listed}\n  leave it out, or name another --checkpoint.save"
            )
    listed = "\n  ".join(dict.fromkeys(tried.values()))
    raise ValueError(
        f"{why}, and what lies below them is not there:\n  {listed}\n  name where it is now:"
        f" --checkpoint.load, or --init for parts{otherwise}"
    )


def _places(config: Config, start: Checkpoint) -> Iterator[list[Path]]:
    """Yield where the folders of a base may be."""
    base = start.state.base
    named = _named(config)
    if named:
        if len(named) == len(base.folders):
            yield [folder / Path(was).name for folder, was in zip(named, base.folders, strict=True)]
        yield named
    yield [Path(folder) for folder in base.folders]
    yield [start.folder.parent / folder for folder in base.beside]


def _named(config: Config) -> list[Path]:
    """Return the folders of weights that the command names."""
    load = config.checkpoint.load
    return [Path(folder) for folder in ([load] if load else config.init.parts.values())]


def _asks_for_others(config: Config, start: Checkpoint) -> bool:
    """Return whether the command names folders of weights that the run did not begin with, and that
    are not the run itself.
    """
    named = _resolved(_named(config))
    own = start.folder.resolve()
    return named not in (_resolved(_named(start.config)), [own], [own.parent])


def _resolved(folders: Sequence[Path]) -> list[Path]:
    return [folder.resolve() for folder in folders]


def _opened(start: Checkpoint, folders: list[Path]) -> Start:
    """Return what is in the folders of a base.

    Raises:
        ValueError: it does not fit the model.
    """
    architecture = start.config.architecture
    parts = start.config.init.parts
    if not folders:
        return None
    if parts:
        found = dict(zip(parts, map(str, folders), strict=True))
        init: Init = replace(start.config.init, **found)
        from_parts.refuse_other(init, architecture)
        return init
    if (folders[0] / "config.json").is_file():
        convert.refuse_other(folders[0], architecture)
        return folders[0]
    base = step_folder.read(folders[0])
    if different := architecture_differences(
        base.config.architecture, architecture, takes_weights=True
    ):
        listed = "\n  ".join(different)
        raise ValueError(f"{base.folder}: is of another model than {start.folder}:\n  {listed}")
    return base


def verify(config: Config, start: Start, found: BaseWeights) -> None:
    """Compare the content of what was found with what the run began with. Collective.

    Raises:
        DamagedError: it is another one; every rank raises it.
    """
    by_size_only = config.checkpoint.verify == "size"
    damage = base_files.damage(start.state.base, found.folders, by_size_only=by_size_only)
    if damage:
        listed = "\n  ".join(damage)
        raise DamagedError(
            f"{start.folder}: holds trained parameters only, and what lies below them is no longer"
            f" what they were trained on:\n  {listed}\n  mend the files, or name another folder"
            " with the same ones: --checkpoint.load, or --init for parts"
        )


def note(config: Config, start: Start, found: BaseWeights | None) -> Base:
    """Note the base weights of a run with ``--checkpoint.trained_only``, for its checkpoints.
    Collective.

    Args:
        config: the run.
        start: what it starts from.
        found: base weights of that.

    Raises:
        ValueError: it is not there any more.
    """
    if not config.checkpoint.trained_only:
        return Base()
    if _is_kept(config, start):
        folders = _locate_again(config, start) if found is None else found.folders
        return base_files.moved(start.state.base, folders, _save(config))
    by_size_only = config.checkpoint.verify == "size"
    return base_files.note(_folders(start), _save(config), by_size_only=by_size_only)


def _save(config: Config) -> Path:
    return Path(config.checkpoint.save)


def _folders(start: Start) -> list[Path]:
    """Return the folders that hold what a run starts from."""
    if start is None:
        return []
    if isinstance(start, Checkpoint):
        return [start.folder]
    return [start] if isinstance(start, Path) else [Path(part) for part in start.parts.values()]
