"""The agreement of all ranks before a process group exists: each inspects the job, and they compare
what they found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint.lock import Lock, held
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config import torchrun
from megavlm.config.schema import Config
from megavlm.health.preflight import DisagreementError, RankView, check_consistency, snapshot
from megavlm.parallel.environment import check_interfaces
from megavlm.train.inspection import inspect
from megavlm.train.resume import Start
from megavlm.train.tasks import task_facts


def agree_to_start(
    config: Config, ahead: Callable[[], None], store: dist.Store, stack: contextlib.ExitStack
) -> tuple[Start, Lock | None]:
    """Find out what to start from, and that all ranks are about to run the same. What is wrong on
    any rank ends every process with status 2.

    Args:
        config: the run.
        ahead: checks what is to run after it, see ``launch``.
        store: shared by the ranks.
        stack: holds the lock of the save folder for as long as it lasts.

    Returns:
        What to start from, and the lock, which the first rank has.
    """
    start = None
    lock = None
    try:
        check_interfaces(uses_nccl=torch.cuda.is_available())
        ahead()
        if config.checkpoint.save and torchrun.rank() == 0:
            lock = _lock_save_folder(Path(config.checkpoint.save), stack)
        start = inspect(config, torchrun.world_size())
        facts = snapshot(config, start=start.folder if isinstance(start, Checkpoint) else start)
        view = RankView(facts=facts | task_facts(config))
    except (ValueError, OSError) as error:
        view = RankView(problem=str(error))
    try:
        check_consistency(
            store,
            torchrun.rank(),
            torchrun.world_size(),
            view,
            timedelta(minutes=config.parallel.timeout_minutes),
            lambda problem: torchrun.refuse(f"error: {problem}"),
        )
    except DisagreementError as error:
        torchrun.refuse(f"error: {error}", is_printed=False)  # rank 0 has told it
        raise SystemExit(2) from None
    return start, lock


def _lock_save_folder(save: Path, stack: contextlib.ExitStack) -> Lock:
    """Hold the lock of the save folder.

    Raises:
        ValueError: another run holds it, or nothing can be written there.
    """
    try:
        return stack.enter_context(held(save))
    except OSError as error:
        raise ValueError(
            f"--checkpoint.save {save}: nothing can be written there ({error})"
        ) from error
