"""Worker processes that stand for ranks. They are copies of one process that has imported
megatron-core, which takes seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

_TIMEOUT_SECONDS = 240
# The server that multiprocessing keeps for everybody may run already, for a test that packs or
# loads, without these modules: each process would then import them, for five seconds.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megavlm.train.launch",
        "tests.ranks.runs",
        "tests.ranks.preloaded",
    ]
)


def start_process(target: Callable, *args: Any) -> ForkServerProcess:
    """Start a process that calls ``target(*args)`` with megatron-core imported."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    with copying():
        process.start()
    return process


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Let what multiprocessing starts, by whatever method, be copies of the process that has
    imported megatron-core.
    """
    context = multiprocessing.get_context("forkserver")
    connect = _SERVER.connect_to_new_process
    with (
        mock.patch.object(forkserver, "connect_to_new_process", connect),
        mock.patch.object(multiprocessing, "get_context", return_value=context),
    ):
        yield


class Pool:
    """Run a function on 1 to 8 gloo ranks; workers start when they are first needed.

    Args:
        timeout_seconds: how long a function may take.
    """

    def __init__(self, timeout_seconds: int = _TIMEOUT_SECONDS):
        self._timeout = timeout_seconds
        self._workers: list[tuple[ForkServerProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megavlm-ranks-")
        self._jobs = 0

    def run(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank of a fresh world.

        Returns:
            What each rank returned, in the order of ranks.

        Raises:
            AssertionError: a rank raised; its traceback is the message. The workers are replaced.
        """
        while len(self._workers) < world_size:
            self._start_worker()
        self._jobs += 1
        store = str(Path(self._folder.name) / f"store-{self._jobs}")
        ranks = self._workers[:world_size]
        for rank, (_, connection) in enumerate(ranks):
            connection.send((function, args, rank, world_size, store, self._timeout))
        answers: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
        while waiting:
            ready = wait(list(waiting), timeout=self._timeout)
            if not ready:
                self.close()
                raise AssertionError(
                    f"ranks {sorted(waiting.values())} of {world_size} did not finish in"
                    f" {self._timeout} s"
                )
            for connection in ready:
                rank = waiting.pop(connection)
                answers[rank] = self._answer(connection, rank)
        return [answers[rank] for rank in range(world_size)]

    def _answer(self, connection: Connection, rank: int) -> Any:
        try:
            failed, answer = connection.recv()
        except (EOFError, ConnectionResetError):
            failed = True
            answer = None
        if failed:
            exit_codes = self.close()
            if answer is None:
                stack = self._crash_file(rank).read_text()
                answer = f"the process died, exit code {exit_codes[rank]}\n{stack}"
            raise AssertionError(f"rank {rank}: {answer}")
        return answer

    def _start_worker(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = start_process(_serve, theirs, self._crash_file(len(self._workers)))
        theirs.close()
        self._workers.append((process, ours))

    def _crash_file(self, rank: int) -> Path:
        """Return where a worker writes its stacks if a signal ends it."""
        return Path(self._folder.name) / f"crash-{rank}"

    def close(self) -> list[int | None]:
        """End all workers; return their exit codes."""
        workers = self._workers
        self._workers = []
        for process, connection in workers:
            # a worker that waits for work ends by itself, and ends the processes that it started
            connection.close()
            process.join(timeout=5)
            process.kill()
            process.join()
        return [process.exitcode for process, _ in workers]


def _serve(connection: Connection, crash_file: Path) -> None:
    import faulthandler
    import gc
    import warnings

    import torch
    import torch.distributed as dist

    from megavlm.parallel import gloo_workers, process_groups

    warnings.filterwarnings("ignore")
    crashes = crash_file.open("w")
    faulthandler.enable(crashes)
    torch.set_num_threads(1)
    gloo_workers.install()  # the group of all ranks is made before a job is
    groups: list[dist.ProcessGroup] = []
    while True:
        gc.freeze()  # what was imported stays, and each job and each save collects garbage
        try:
            function, args, rank, world_size, store, seconds = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * seconds)
        try:
            timeout = timedelta(seconds=seconds)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
            answer = False, function(*args)
        except BaseException:
            answer = True, traceback.format_exc()
        # They end one job late. A thread of theirs that still lets go of its last tensors needs
        # Python's lock, which torch would hold while it waits for the thread to end.
        ending = groups
        groups = list(dist.distributed_c10d._world.pg_map)
        process_groups.destroy()  # a function that failed may have left its groups
        if dist.is_initialized():
            dist.destroy_process_group()
        ending.clear()
        left = models_in_memory()
        faulthandler.cancel_dump_traceback_later()
        if left and not answer[0]:
            answer = True, f"{function.__name__} left {', '.join(left)} in memory"
        connection.send(answer)


def models_in_memory() -> list[str]:
    """Collect garbage, and return the kinds of models that are left: they would be in the way of
    the next stage of a command.
    """
    import gc

    from megatron.core.distributed import DistributedDataParallel

    from megavlm.model.vlm import VisionLanguageModel

    gc.collect()
    models = (DistributedDataParallel, VisionLanguageModel)
    kinds = (type(one) for one in gc.get_objects())  # not isinstance: some are proxies of nothing
    return [kind.__name__ for kind in kinds if issubclass(kind, models)]
