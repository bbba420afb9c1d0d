"""What a run starts from: its own newest checkpoint that is whole, or one that it is given.

A run that finds its own newest checkpoint damaged says so and resumes from the one before. One that
the user names is taken or refused.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch.distributed as dist

from megavlm.checkpoint import checksums, directory, step_folder
from megavlm.checkpoint.base_files import Base
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import History, State
from megavlm.config import torchrun
from megavlm.config.checks.resume import refusals
from megavlm.config.checks.rules import ConfigError
from megavlm.config.checks.saving import exported_step
from megavlm.config.schema import Config, Init
from megavlm.data.records.readers import is_annotation
from megavlm.data.store.manifest import read_manifest
from megavlm.train.architecture_differences import architecture_differences

Start = Checkpoint | Path | Init | None
"""What a run starts from: a checkpoint, a Hugging Face folder, parts, or nothing."""


class DamagedError(ValueError):
    """A checkpoint that is not what was written, and nothing to take its place."""


def find_own(config: Config) -> Checkpoint | None:
    """Find the newest checkpoint of this very run, to resume from, without reading its shards.

    Raises:
        DamagedError: no checkpoint of the run can be read.
        ValueError: the save folder holds something else.
    """
    save = Path(config.checkpoint.save)
    if not config.checkpoint.save or not save.exists():
        return None
    found = directory.candidates(save)
    if found:
        return _first_whole(config, found, [])
    strangers = sorted(entry.name for entry in save.iterdir() if not directory.is_own(entry))
    if strangers:
        listed = ", ".join(strangers[:3])
        raise ValueError(
            f"--checkpoint.save {save}: the folder holds something else already ({listed}); name"
            " another one"
        )
    return None


def has_begun(config: Config) -> bool:
    """Tell whether the run's save folder holds a checkpoint."""
    save = Path(config.checkpoint.save)
    return save.is_dir() and bool(directory.candidates(save))


def steps_done(config: Config) -> int:
    """Return the step of the newest checkpoint of a run; 0 if there is none that the next stage
    could start from: it cannot be read, or holds trained parameters only.
    """
    try:
        found = step_folder.find(config.checkpoint.save)
    except (ValueError, OSError):
        return 0
    return found.state.step if found else 0


def is_done(config: Config) -> bool:
    """Tell whether the newest checkpoint of a run is its last one, and its export is written."""
    steps = config.training.steps
    files = config.checkpoint
    exports = files.export_hf and exported_step(files, averages=config.ema.export) != steps
    return 0 < steps <= steps_done(config) and not exports


def _first_whole(config: Config, candidates: Sequence[Path], problems: list[str]) -> Checkpoint:
    """Find the first checkpoint that can be read and is of this model; print what is wrong with
    those before it and add it to ``problems``.
    """
    for candidate in candidates:
        try:
            found = step_folder.read(candidate)
            if differences := architecture_differences(
                found.config.architecture, config.architecture
            ):
                raise ValueError(
                    f"{candidate / step_folder.CONFIG_NAME}: of another model\n  "
                    + "\n  ".join(differences)
                )
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if problems:
            _warn(
                f"--checkpoint.save {candidate.parent}: the newest checkpoint cannot be used; the"
                f" run resumes from {candidate.name}",
                problems,
            )
        return _of_this_stage(config, found)
    save = config.checkpoint.save
    listed = "\n  ".join(problems)
    raise DamagedError(
        f"--checkpoint.save {save}: no checkpoint of this run can be used, and starting anew would"
        f" overwrite them:\n  {listed}\n  name another folder, or mend files that are damaged"
    )


def _warn(text: str, problems: Sequence[str]) -> None:
    if torchrun.rank() == 0:
        print("\n  ".join([f"WARNING: {text}", *problems]), file=sys.stderr, flush=True)


def _of_this_stage(config: Config, found: Checkpoint) -> Checkpoint:
    save = config.checkpoint.save
    if found.config.recipe != config.recipe:
        raise ValueError(
            f"--checkpoint.save {save}: it holds checkpoints of recipe {found.config.recipe}, and"
            f" this is recipe {config.recipe}; name another folder, and give this one to"
            " --checkpoint.load to start from its weights"
        )
    if found.state.stage != config.stage:
        raise ValueError(
            f"--checkpoint.save {save}: it holds checkpoints of stage {found.state.stage}, and this"
            f" is stage {config.stage}; name another folder, and give this one to --checkpoint.load"
            " to start from its weights"
        )
    return check_fits(config, found)


def check_fits(config: Config, start: Checkpoint) -> Checkpoint:
    """Refuse a checkpoint that this job cannot start from."""
    problems = architecture_differences(
        start.config.architecture,
        config.architecture,
        takes_weights=not resumes(config, start),
    )
    problems += _tokenizer_problems(config, start)
    if resumes(config, start):
        own = start.folder if is_own(config, start) else None
        # What lies below checkpoints of trained parameters is known by its content.
        by_content = needs_base(config, start)
        problems += refusals(start.config, config, own=own, by_content=by_content)
        problems += _pack_problems(config, start)
        _warn_of_other_packs(config, start)
    elif config.checkpoint.moments == "keep" and (problem := _moments_problem(config, start)):
        problems.append(f"--checkpoint.moments keep: {problem}; use fresh")
    if problems:
        listed = "\n  ".join([*problems, *_other_ways(config, start)])
        raise ConfigError(f"the checkpoint {start.folder} does not fit this run:\n  {listed}")
    return start


def _moments_problem(config: Config, start: Checkpoint) -> str:
    """Return why a new stage cannot keep the moments of a checkpoint; empty if it can."""
    if start.state.stage is None:
        return f"{start.folder} was made by conversion and has no moments"
    if start.config.training.frozen_until:
        return (
            f"stage {start.state.stage} unfroze parameters on its way (--training.frozen_until),"
            " whose moments are younger than others"
        )
    if (kind := start.config.optimizer.kind) != config.optimizer.kind:
        return (
            f"{start.folder} has the moments of --optimizer.kind {kind}, and the run has"
            f" {config.optimizer.kind}"
        )
    return ""


def _other_ways(config: Config, start: Checkpoint) -> list[str]:
    """Return how a run could start from a checkpoint that it cannot resume; empty if it cannot."""
    if not resumes(config, start) or start.state.trained_only:
        return []
    before = start.config.architecture
    if architecture_differences(before, config.architecture, takes_weights=True):
        return []
    if _tokenizer_problems(config, start):
        return []
    return [
        "to start a new run from its weights, with fresh moments: --checkpoint.load"
        f" {start.folder} --checkpoint.weights_only true"
        + (", and a new --checkpoint.save" if is_own(config, start) else "")
    ]


def _tokenizer_problems(config: Config, start: Checkpoint) -> list[str]:
    if not has_packs(config):
        return []
    tokenizer = read_manifest(config.data.train_folders[0]).tokenizer_fingerprint
    if start.state.tokenizer in (None, tokenizer):
        return []
    words = start.folder / step_folder.TOKENIZER
    return [
        f"--data.train {config.data.train}: packed with another tokenizer than the"
        f" checkpoint's, {words}"
    ]


def _pack_problems(config: Config, start: Checkpoint) -> list[str]:
    if not has_packs(config):
        return []
    indexes = index_sums(config)
    if start.state.indexes != indexes and sorted(start.state.indexes) == sorted(indexes):
        return [
            f"--data.train {config.data.train}: names the folders in another order than the run"
            f" began with, {start.config.data.train}; the order of their packs, and what"
            " --data.weights says, would be another"
        ]
    if start.state.packs in ((), pack_counts(config)):
        return []
    before, now = (
        " + ".join(f"{count:,}" for count in packs)
        for packs in (start.state.packs, pack_counts(config))
    )
    return [
        f"--data.train {config.data.train}: has {now} packs, and the run began with"
        f" {before}: its order would be another"
    ]


def _warn_of_other_packs(config: Config, start: Checkpoint) -> None:
    """Tell of folders that hold as many packs as before, but others."""
    if not has_packs(config) or start.state.packs != pack_counts(config):
        return
    found = zip(config.data.train_folders, start.state.indexes, index_sums(config), strict=False)
    for folder, before, now in found:
        if before != now:
            _warn(
                f"--data.train {folder}: its packs are others than those that the run was trained"
                " on; in this epoch, samples may come twice or never",
                [],
            )


def has_packs(config: Config) -> bool:
    """Tell whether all training data is packed: always, but for ``--check``, which packs no
    annotation files.
    """
    return not any(map(is_annotation, config.data.train_folders))


def pack_counts(config: Config) -> tuple[int, ...]:
    """Packs of each folder of training packs."""
    return tuple(read_manifest(folder).totals.packs for folder in config.data.train_folders)


def index_sums(config: Config) -> tuple[int, ...]:
    """Checksums of the indexes of the folders of training packs."""
    return tuple(read_manifest(folder).idx_crc32 for folder in config.data.train_folders)


def unreadable_packs(state: State, indexes: Sequence[int]) -> tuple[int, ...]:
    """Return the ids of packs that a run could not read and that it still has: in a folder that was
    packed again since, another pack has the id.

    Args:
        state: of the run's checkpoint.
        indexes: of the folders as they are now, see ``index_sums``.
    """
    ends = list(accumulate(state.packs))
    is_same = [before == now for before, now in zip(state.indexes, indexes, strict=False)]
    return tuple(pack for pack in state.unreadable_packs if is_same[bisect_right(ends, pack)])


def resumes(config: Config, start: Start) -> bool:
    """Tell whether a run resumes a checkpoint, rather than only take weights: its own always,
    another one of the same stage unless its weights are all that is asked for.
    """
    if not isinstance(start, Checkpoint):
        return False
    takes_weights = config.checkpoint.weights_only and not is_own(config, start)
    is_same_stage = (start.config.recipe, start.state.stage) == (config.recipe, config.stage)
    return is_same_stage and not takes_weights


def needs_base(config: Config, start: Start) -> bool:
    """Tell whether a run resumes a checkpoint and needs its base weights: the checkpoint, or those
    to come, hold trained parameters only.
    """
    if not resumes(config, start):
        return False
    has_more_steps = start.state.step < config.training.steps
    keeps_base = config.checkpoint.trained_only and has_more_steps and start.state.base != Base()
    return start.state.trained_only or keeps_base


def first_step(config: Config, start: Start) -> int:
    """Return the number of updates that are done when the run starts."""
    return start.state.step if resumes(config, start) else 0


def is_own(config: Config, start: Start) -> bool:
    """Tell whether a run starts from a checkpoint in its save folder."""
    save = config.checkpoint.save
    return isinstance(start, Checkpoint) and bool(save) and start.folder.parent == Path(save)


def history(config: Config, start: Start) -> History:
    """Earlier stages whose moments the run keeps."""
    if not isinstance(start, Checkpoint):
        return ()
    if resumes(config, start):
        return start.state.history
    before = (start.state.updates, start.config.training.trainable)
    return (*start.state.history, before) if config.checkpoint.moments == "keep" else ()


def find_undamaged(config: Config, start: Checkpoint) -> Checkpoint:
    """Find the checkpoint to load whose files all have the checksums they were written with.
    Collective.

    Args:
        config: the run.
        start: the first choice.

    Returns:
        That one, or, where it is the run's own and damaged, the newest one before it that is whole.

    Raises:
        DamagedError: it is damaged and not the run's own, or all of the run's own are; every rank
            raises it.
    """
    problems: list[str] = []
    choice: list[Checkpoint | str] = [start]
    while True:
        dist.broadcast_object_list(choice)  # what rank 0 sees in the folder counts
        if isinstance(choice[0], str):
            raise DamagedError(choice[0])
        start = choice[0]
        found = checksums.damage(start.folder, by_size_only=config.checkpoint.verify == "size")
        if not found:
            if not os.path.exists(start.folder / checksums.FILE_NAME):
                _warn(f"{start.folder}: loaded unchecked, it has no {checksums.FILE_NAME}", [])
            return start
        problems += found
        if not is_own(config, start):
            listed = "\n  ".join(problems)
            raise DamagedError(
                f"--checkpoint.load {start.folder}: the checkpoint is damaged; name another one:\n"
                f"  {listed}"
            )
        if dist.get_rank() == 0:
            choice = [_one_before(config, start, problems)]


def _one_before(config: Config, start: Checkpoint, problems: list[str]) -> Checkpoint | str:
    """Return the newest checkpoint of the run before one that is damaged, or why there is none."""
    damaged = directory.step_of(start.folder)
    try:
        found = directory.candidates(start.folder.parent)
        before = [one for one in found if directory.step_of(one) < damaged]
        return _first_whole(config, before, problems)
    except (ValueError, OSError) as error:  # or the one before does not fit this run
        return str(error)
