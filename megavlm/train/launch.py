"""From a process that torchrun has started to a rank that runs the job, and the ends of a job that
cannot run on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import State
from megavlm.config import torchrun
from megavlm.config.checks.resume import with_origin
from megavlm.config.schema import Config
from megavlm.health import out_of_memory
from megavlm.parallel import backend, process_groups
from megavlm.train import resume
from megavlm.train.agreement import agree_to_start
from megavlm.train.bad_steps import StepError
from megavlm.train.master_weights import MismatchError
from megavlm.train.resume import DamagedError
from megavlm.train.run_job import run_job
from megavlm.train.saver import SaveError
from megavlm.train.stop_signal import StopRequest, ignore_save_signal


def launch(
    config: Config,
    stop: StopRequest | None = None,
    *,
    ahead: Callable[[], None] = lambda: None,
    attempt: int = 0,
    can_go_back: bool = False,
) -> State:
    """Run a training job, and return where it ended; what is wrong with it, on any rank, ends every
    process with status 2 before any process group exists.

    Args:
        config: the run.
        stop: what people ask of the whole command; none: of this run alone.
        ahead: checks what is to run after it, and raises ValueError if that cannot run; what it
            finds on any rank counts as wrong with this run.
        attempt: how often this command has run the job before.
        can_go_back: raise DamagedError, on every rank, instead of ending the process.
    """
    if stop is None:
        ignore_save_signal()
    backend.set_environment(config.training.deterministic)
    run_name = f"{config.stage}/{attempt}" if attempt else config.stage
    store = backend.meet(config.parallel.timeout_minutes, run_name)
    with contextlib.ExitStack() as stack:
        start, lock = agree_to_start(config, ahead, store, stack)
        if isinstance(start, Checkpoint) and resume.is_own(config, start):
            config = with_origin(config, start.config)
        device_backend = backend.start(
            config.parallel.timeout_minutes,
            deterministic=config.training.deterministic,
            store=store,
        )
        out_of_memory.record_memory(config)
        try:
            return run_job(config, device_backend, start, lock, stop)
        except (DamagedError, MismatchError, SaveError, StepError) as error:
            if can_go_back and isinstance(error, DamagedError):
                raise
            # Every rank knows of it, so none waits for another.
            torchrun.refuse(f"error: {error}", is_told=torchrun.rank() == 0)
            raise SystemExit(2) from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            _report_full_memory(config, error)
            raise SystemExit(1) from None
        finally:
            process_groups.destroy()
            backend.stop()


def _report_full_memory(config: Config, error: BaseException) -> None:
    """Print what would save memory. The other ranks end with this one."""
    lines = [out_of_memory.advice(config, torchrun.world_size(), error)]
    if config.profile.memory_snapshot:
        lines.append(out_of_memory.write_snapshot(config, torchrun.rank()))
    torchrun.refuse("\n".join(lines))
