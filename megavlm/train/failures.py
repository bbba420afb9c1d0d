"""What ends a run and is no mistake in the code: told in words, without a traceback."""

from __future__ import annotations

from megavlm.checkpoint.rank_errors import RankError
from megavlm.config import torchrun
from megavlm.config.schema import Config
from megavlm.data.loading.loader import WorkerError
from megavlm.health import out_of_memory
from megavlm.io.remote import RemoteError
from megavlm.io.storage import ReadError
from megavlm.train.bad_steps import StepError
from megavlm.train.export import ExportError
from megavlm.train.master_weights import MismatchError
from megavlm.train.resume import DamagedError
from megavlm.train.saver import SaveError

OF_ALL_RANKS = (DamagedError, MismatchError, RankError, SaveError, StepError)
"""What every rank raises."""
# How gloo and NCCL word that another rank ended.
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
_OF_ONE_RANK = (ExportError, ReadError, RemoteError, WorkerError)


def report(config: Config, error: Exception) -> int | None:
    """Print why a run ends.

    Args:
        config: the run.
        error: that ended it on this rank.

    Returns:
        The exit status; none if nothing was printed, since the error needs its traceback.
    """
    if isinstance(error, OF_ALL_RANKS):
        torchrun.refuse(f"error: {error}", is_printed=torchrun.rank() == 0)
        return 2
    names_file = isinstance(error, OSError) and bool(error.filename)
    if isinstance(error, _OF_ONE_RANK) or names_file:
        # The other ranks wait for this one until torchrun ends them.
        kept = "" if isinstance(error, ExportError) else _kept(config)  # it says so itself
        torchrun.refuse(f"error on {torchrun.name_of_rank()}: {error}{kept}")
        return 1
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST):
        torchrun.refuse(
            f"error on {torchrun.name_of_rank()}: another rank ended, so this one cannot go on; why"
            f" it did is above, or it was killed{_kept(config)} ({error})"
        )
        return 1
    if out_of_memory.is_out_of_memory(error):
        _report_full_memory(config, error)
        return 1
    return None


def _kept(config: Config) -> str:
    """Say from where the same command resumes; an evaluation begins anew."""
    if not config.checkpoint.save or config.eval.only:
        return ""
    return f"; the same command resumes from the last checkpoint in {config.checkpoint.save}"


def _report_full_memory(config: Config, error: BaseException) -> None:
    """Print what would save memory. The other ranks end with this one."""
    lines = [out_of_memory.advice(config, torchrun.world_size(), error)]
    if config.profile.memory_snapshot:
        lines.append(out_of_memory.write_snapshot(config, torchrun.rank()))
    torchrun.refuse("\n".join(lines))
