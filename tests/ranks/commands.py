"""``pretrain_vlm.py`` as users start it, in copies of the process that has imported megatron-core.

Started anew, each of its processes takes five seconds for that. What torchrun itself does is
tested in ``test_torchrun.py`` and ``test_crash.py``.
"""

from __future__ import annotations

import gc
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.ranks.pool import start_process

PROGRAM = Path(__file__).parents[2] / "pretrain_vlm.py"
_PATIENCE_SECONDS = 240


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def become_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    """Make this process a rank as torchrun starts one, whose output goes to ``output``.RANK.out
    and ``output``.RANK.err.
    """
    for number, name in ((1, "out"), (2, "err")):
        path = output.with_name(f"{output.name}.{rank}.{name}")
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(1)


def start(commands: Sequence[Sequence[str]], output: Path) -> list[ForkServerProcess]:
    """Start a rank with each command line; one alone starts as without torchrun.

    Args:
        commands: options of each rank.
        output: where to write what they print, as ``become_rank`` does.
    """
    port = free_port()
    return [
        start_process(_train, rank, len(commands), port, output, list(command))
        for rank, command in enumerate(commands)
    ]


def _train(rank: int, ranks: int, port: int, output: Path, arguments: list[str]) -> None:
    become_rank(rank, ranks, port, output)
    sys.argv = [str(PROGRAM), *arguments]
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert gc.isenabled()  # not while it imports


def wait(processes: Sequence[ForkServerProcess], output: Path) -> subprocess.CompletedProcess:
    """Wait for ranks; return a status, the first that is not 0, and the output of all ranks."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    statuses = [process.exitcode for process in processes if process.exitcode]
    out, err = (
        "".join(
            output.with_name(f"{output.name}.{rank}.{name}").read_text()
            for rank in range(len(processes))
        )
        for name in ("out", "err")
    )
    return subprocess.CompletedProcess(PROGRAM.name, statuses[0] if statuses else 0, out, err)


def run(commands: Sequence[Sequence[str]], output: Path) -> subprocess.CompletedProcess:
    """Start ranks and wait for them; arguments of ``start``, result of ``wait``."""
    return wait(start(commands, output), output)
