"""The stages of one command, in turn."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.config import torchrun
from megavlm.config.schema import Config
from megavlm.data.store.manifest import read_manifest
from megavlm.parallel import backend
from megavlm.train import resume, start_point
from megavlm.train.architecture_differences import architecture_differences
from megavlm.train.inspection import find_start, inspect_job
from megavlm.train.launch import launch
from megavlm.train.resume import DamagedError
from megavlm.train.stop_signal import StopRequest


def launch_all(stages: Sequence[Config]) -> None:
    """Run the stages of a command in turn, beginning with the last one that has a checkpoint. One
    that is done is not built again. A signal or ``--training.max_hours``, which counts all stages,
    ends the command after the checkpoint of the stage at hand.

    If the last checkpoint of a stage is damaged, the stage resumes from the one before, and the
    next one starts from what it then saves.
    """
    store = backend.meet(stages[0].parallel.timeout_minutes)
    stores = (dist.PrefixStore(f"run {number}", store) for number in itertools.count())
    number, problem = _agreed_first(stages, store)
    if stages[0].eval.only:  # it has nothing to save, so a signal ends it at once
        launch(stages[0], StopRequest(), store=next(stores))
        return
    for text in _left(stages, number):
        _warn(text)
    ahead: Callable[[], None] = partial(_check_ahead, stages[number:], problem)
    retried: set[int] = set()
    with StopRequest() as stop:
        while number < len(stages):
            config = stages[number]
            stop.limit(config.training.max_hours)
            goes_back = number > 0 and number not in retried
            try:
                state = launch(config, stop, store=next(stores), ahead=ahead, can_go_back=goes_back)
            except DamagedError as error:
                before = stages[number - 1].stage
                _warn(f"{error}\nstage {before} resumes from the checkpoint before")
                retried |= {number - 1, number}
                number -= 1
                continue
            finally:
                ahead = partial(_check_ahead, ())  # once, before anything runs
            if state.step < config.training.steps or stop.is_agreed:
                return
            number += 1
            # The model goes before the next one is built.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _warn(text: str) -> None:
    if torchrun.rank() == 0:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _left(stages: Sequence[Config], number: int) -> Iterator[str]:
    """Yield which stages before stage ``number`` have fewer steps than the command asks for, and
    get no more, since a later one has begun.
    """
    for config, later in pairwise(stages[: number + 1]):
        steps = resume.steps_done(config)
        if 0 < steps < config.training.steps:
            yield (
                f"stage {config.stage} is at step {steps} of {config.training.steps} and stays so,"
                f" since a later one has begun; to train it on, move {later.checkpoint.save} and"
                " those of the stages behind it away"
            )


def _agreed_first(stages: Sequence[Config], store: dist.Store) -> tuple[int, str]:
    """Return the number of the stage to begin with, as the first rank sees the save folders: others
    may have an older view of a network file system, and would wait in another run. Beside it, on
    that rank, why it cannot tell; all ranks hear of it when they compare what they run.
    """
    problem = ""
    if torchrun.rank() == 0:
        first = 0
        try:
            first = _first(stages)
        except OSError as error:
            folder = Path(stages[0].checkpoint.save).parent
            problem = f"--checkpoint.save {folder}: cannot be read ({error})"
        store.set("first", str(first))
    minutes = stages[0].parallel.timeout_minutes
    try:
        store.wait(["first"], timedelta(minutes=minutes))
    except RuntimeError:
        raise RuntimeError(
            f"rank 0 has not said within {minutes} minutes (--parallel.timeout_minutes) which stage"
            f" comes first, by the checkpoints in {Path(stages[0].checkpoint.save).parent}"
        ) from None
    # A rank with fewer stages, by a command of its own, is refused by the comparison of all ranks.
    return min(int(store.get("first")), len(stages) - 1), problem


def _first(stages: Sequence[Config]) -> int:
    """Return the number of the stage to begin with."""
    if len(stages) == 1:
        return 0
    begun = [number for number, config in enumerate(stages) if resume.has_begun(config)]
    first = max(begun, default=0)
    is_over = first < len(stages) - 1 and resume.is_done(stages[first])
    return first + 1 if is_over else first


def describe_start(stages: Sequence[Config]) -> str:
    """Return in words what the stages would start from; nothing is built or written.

    Raises:
        ValueError: it would be refused, or a later stage's save folder would.
        OSError: it cannot be read.
    """
    number = _first(stages)
    first = stages[number]
    text = start_point.describe_ahead(first, find_start(first))
    text = "\n".join([text, *_left(stages, number)])
    for run in stages[number + 1 :]:
        try:
            resume.find_own(run)
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {run.stage}: {error}") from error
    return text if len(stages) == 1 else f"stage {first.stage} comes first: {text}"


def _check_ahead(stages: Sequence[Config], problem: str = "") -> None:
    """Check the stages after the first of these.

    Raises:
        ValueError: everything that would keep one of them from running, in one message; or the
            problem.
    """
    if problem:
        raise ValueError(problem)
    if found := list(_problems_ahead(stages)):
        raise ValueError("\n  ".join(["a later stage could not run:", *found]))


def _problems_ahead(stages: Sequence[Config]) -> Iterator[str]:
    """Yield what would keep a later stage from running, as far as it can be known before the stages
    before it have run.
    """
    for before, run in pairwise(stages):
        name = f"stage {run.stage}"
        try:
            # What it starts from is not there yet.
            files = replace(run.checkpoint, load="", weights_only=False, moments="fresh")
            inspect_job(replace(run, checkpoint=files), torchrun.world_size())
            resume.find_own(run)
        except (ValueError, OSError) as error:
            yield f"{name}: {error}"
            continue
        for text in architecture_differences(
            before.architecture, run.architecture, takes_weights=True
        ):
            yield f"{name}: {text}".replace("in the checkpoint", f"in stage {before.stage}")
        packs = [read_manifest(config.data.train_folders[0]) for config in (before, run)]
        if packs[0].tokenizer_fingerprint != packs[1].tokenizer_fingerprint:
            yield (
                f"{name}: --data.train {run.data.train}: packed with another tokenizer than"
                f" {before.data.train} of stage {before.stage}"
            )
