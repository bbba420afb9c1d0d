"""Writes this rank's shards of a checkpoint, here or in a process of its own while training goes
on.

This takes the place of megatron-core's own queue of asynchronous calls. That one starts a server
process in every rank (torch imported once more), loses it when torchrun passes SIGTERM on to the
whole process group, and does not tell what went wrong on which rank.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megavlm.checkpoint import checksums, common_file, whole_shards
from megavlm.checkpoint.writer_processes import end_with_parent, watched_writers
from megavlm.io.checksum import Sum

# From 0.19 on megatron-core has two ways to write beside training; the other one is a package of
# its own.
_STRATEGY = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How writing ended on this rank.

    Args:
        results: what megatron-core wants to know to describe the checkpoint; none where this rank
            had nothing to write.
        sums: size and checksum of each file, by name.
        error: why it failed; empty if it did not.
    """

    results: Any = None
    sums: dict[str, Sum] | None = None
    error: str = ""


class _TellingStrategy(TorchDistSaveShardedStrategy):
    """Saves as megatron-core does by default, and remembers why shards could not be described: rank
    0 alone writes their description, and the other ranks wait for it in a collective.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.error = ""

    def _get_save_and_finalize_callbacks(self, writer: Any, *arguments: Any) -> Any:
        """``async_save`` calls this hook with what writes this rank's shards."""
        finish = writer.finish

        def finish_or_tell(*results: Any) -> None:
            try:
                finish(*results)
            except OSError as error:
                self.error = f"{type(error).__name__}: {error}"

        writer.finish = finish_or_tell
        return super()._get_save_and_finalize_callbacks(writer, *arguments)


class Writing:
    """Shards of this rank on their way to the disk; when the constructor returns, the weights may
    change. Collective.

    Args:
        tensors: what to save, as megatron-core describes it.
        shards: folder for it, which exists.
        beside: write in a process of its own.
    """

    def __init__(self, tensors: ShardedStateDict, shards: Path, *, beside: bool):
        # megatron-core passes results through this queue; one inside the process does, since
        # nothing else writes to it here.
        self._queue: queue.Queue = queue.Queue()
        vars(filesystem_async)["_results_queue"] = self._queue
        whole_shards.check(tensors)
        self._strategy = _TellingStrategy()
        errors = common_file.watched()
        request = dist_checkpointing.save(
            tensors,
            str(shards),
            sharded_strategy=self._strategy,
            validate_access_integrity=False,
            async_sharded_save=True,
            **_STRATEGY,
        )
        self._finish = request.finalize_fns
        self._outcome = Outcome(error=errors[0]) if errors else None
        if self._outcome is not None:
            return
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            # Copies from the device to the host, and waits for them.
            arguments[1] = request.preload_fn()
        write = request.async_fn and partial(
            request.async_fn, *arguments, **request.async_fn_kwargs
        )
        work = partial(_write, write, self._queue, shards)
        if not beside:
            self._outcome = work()
            return
        try:
            self._start(work)
        except OSError as error:  # of this rank: no memory for another process, or no open files
            self._outcome = Outcome(error=f"{type(error).__name__}: {error}")

    def _start(self, work: Callable[[], Outcome]) -> None:
        # A forked process has the memory as it is now; pages that training changes are copied for
        # it.
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(work, theirs, os.getpid()), name="checkpoint"
        )
        self._process.start()
        theirs.close()

    @property
    def is_done(self) -> bool:
        """Whether this rank's shards are written, or have failed to be."""
        return self._outcome is not None or self._pipe.poll()

    def wait(self) -> Outcome:
        """Wait for the writing to end on this rank."""
        if self._outcome is None:
            with contextlib.suppress(EOFError):  # it was killed
                self._outcome = self._pipe.recv()
            self._process.join()
            self._outcome = self._outcome or Outcome(
                error=f"the writing process ended with status {self._process.exitcode}"
            )
        return self._outcome

    def describe(self) -> str:
        """Write what the shards are, and return what went wrong with it on this rank. Collective,
        when every rank has written without an error.
        """
        if self.wait().results is not None:
            self._queue.put(self._outcome.results)
        *finishes, finish_settings = self._finish
        for finish in finishes:
            finish()
        try:
            finish_settings()
        except OSError as error:  # of rank 0, and the others wait behind it
            dist.barrier()
            return f"{type(error).__name__}: {error}"
        return self._strategy.error


def _write(write: Callable[[], None] | None, results: queue.Queue, shards: Path) -> Outcome:
    if write is None:
        return Outcome(sums={})
    try:
        with watched_writers():
            write()
        found = results.get_nowait()
        if isinstance(found, Exception):
            raise found
        # Not by a look into the folder, where the files of all ranks are.
        names = {result.storage_data.relative_path for each in found.values() for result in each}
        return Outcome(
            results=found,
            sums={f"{shards.name}/{name}": checksums.measure(shards / name) for name in names},
        )
    except Exception as error:  # whatever it is, other ranks wait for an answer
        return Outcome(error=f"{type(error).__name__}: {error}")


def _serve(work: Callable[[], Outcome], pipe: Connection, rank_pid: int) -> None:
    """Run in the writing process. Ignore signals, since the rank waits for this process before it
    ends; collect no garbage, since that would touch CUDA.
    """
    end_with_parent(rank_pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()
    pipe.send(work())
