"""From a process that torchrun has started to a rank that runs the job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch.distributed as dist

from megavlm.checkpoint.train_state import State
from megavlm.config import torchrun
from megavlm.config.checks.resume import with_origin
from megavlm.config.schema import Config
from megavlm.health import out_of_memory
from megavlm.health.lost_ranks import LostRankWatch
from megavlm.parallel import backend, process_groups
from megavlm.train import failures, resume
from megavlm.train.agreement import agree_to_start
from megavlm.train.resume import DamagedError
from megavlm.train.run_job import run_job
from megavlm.train.stop_signal import StopRequest


def launch(
    config: Config,
    stop: StopRequest,
    *,
    store: dist.Store,
    ahead: Callable[[], None] = lambda: None,
    can_go_back: bool = False,
) -> State:
    """Run a training job, and return where it ended; what is wrong with it, on any rank, ends every
    process with status 2 before any process group exists.

    Args:
        config: the run.
        stop: what people ask of the command.
        store: shared by the ranks, for this run alone.
        ahead: checks what is to run after it, and raises ValueError if that cannot run; what it
            finds on any rank counts as wrong with this run.
        can_go_back: raise DamagedError, on every rank, instead of ending the process, unless the
            run has checkpoints of its own.
    """
    with contextlib.ExitStack() as stack:
        start, lock = agree_to_start(config, ahead, store, stack)
        has_begun = resume.is_own(config, start)
        if has_begun:
            config = with_origin(config, start.config)
        stack.enter_context(_watch_for_lost_ranks(config, store))
        device_backend = backend.start(
            config.parallel.timeout_minutes,
            deterministic=config.training.deterministic,
            store=store,
        )
        out_of_memory.record_memory(config)
        try:
            state = run_job(config, device_backend, start, lock, stop)
        except Exception as error:
            # After an error of one rank the others wait in a collective, and NCCL would wait for
            # them: the rank ends without taking leave, and torchrun ends the others.
            if isinstance(error, failures.OF_ALL_RANKS):
                _leave()
            if can_go_back and not has_begun and isinstance(error, DamagedError):
                raise
            status = failures.report(config, error)
            if status is None:
                raise
            raise SystemExit(status) from None
        _leave()
        return state


def _watch_for_lost_ranks(
    config: Config, store: dist.Store
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which this rank ends soon after the process of another one has."""
    if torchrun.world_size() == 1:
        return contextlib.nullcontext()
    return LostRankWatch(
        # A connection of its own: the other may be waiting.
        dist.PrefixStore("lost ranks", store.clone()),
        torchrun.rank(),
        torchrun.local_rank(),
        torchrun.local_size(),
        config.health.hang_seconds,
    )


def _leave() -> None:
    """Leave the process groups. Collective."""
    process_groups.destroy()
    backend.stop()
