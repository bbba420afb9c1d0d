"""What torchrun tells each process that it starts, and what it is told by one that ends."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time

_OF_A_JOB = ("RANK", "MASTER_ADDR", "MASTER_PORT")
# Connections of a rank to the key-value store that torchrun serves: the rank's own, those of the
# watchdog and the watch for lost machines, of the watch for lost ranks, and NCCL's.
_CONNECTIONS = 4
_OTHER_FILES = 64
# Characters of a reason that torchrun repeats for each rank.
_MOST_REPEATED = 2000


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this rank, before and after the process group exists."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the number of this rank on its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Return the number of ranks on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def store_at() -> tuple[str, int] | None:
    """Return host and port of the key-value store that the ranks share; none without one."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def problems() -> list[str]:
    """Name what is wrong with the variables of the environment that torchrun sets."""
    found = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        given = os.environ.get(name, "0")
        if not given.isdecimal():
            found.append(f"{name}={given} in the environment: not a number of ranks; unset it")
    size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in _OF_A_JOB if name not in os.environ]
    if not found and int(size) > 1 and missing:
        found.append(
            f"WORLD_SIZE={size} in the environment, but not {', '.join(missing)}, which torchrun"
            " sets too: start the run with torchrun, or unset WORLD_SIZE for one rank"
        )
    if not found and int(size) <= int(os.environ.get("RANK", 0)):
        found.append(
            f"RANK={os.environ.get('RANK', 0)} in the environment, but WORLD_SIZE is {size}: start"
            " the run with torchrun, or unset both for one rank"
        )
    found += [] if found else _open_files(int(size))
    several_nodes = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several_nodes and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        found.append(
            "torchrun --max-restarts on several nodes: each node counts restarts for itself, so"
            " their ranks would not meet again; use --max-restarts 0 and start the job again"
        )
    return found


def _open_files(size: int) -> list[str]:
    """Name the limit of open files, which this rank has of the torchrun that started it, if the
    store could not hold its connections to all ranks: those that come last would be refused.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _CONNECTIONS * size + _OTHER_FILES
    if size == 1 or rank() or limit == resource.RLIM_INFINITY or limit >= needed:
        return []
    return [
        f"ulimit -n {limit}: the store of torchrun needs {needed} open files for {size} ranks;"
        ' raise the limit where torchrun is started: ulimit -n "$(ulimit -H -n)"'
    ]


def name_of_rank() -> str:
    """Return this rank and its machine, such as ``rank 3 (node1)``."""
    return f"rank {os.environ.get('RANK', 0)} ({socket.gethostname()})"


def refuse(text: str, *, is_printed: bool = True) -> None:
    """Say why the run ends, and leave it where torchrun finds it, which repeats it last, below its
    own traceback: once for each rank, so of a long text the beginning is left.

    Args:
        text: the reason, in words.
        is_printed: print it; false on ranks for which another one does.
    """
    if is_printed:
        print(text, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        if len(text) > _MOST_REPEATED:
            text = f"{text[:_MOST_REPEATED]} ... (the rest is told once, by rank 0 or by this rank)"
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": text, "extraInfo": more}}, file)
        except OSError:
            return  # it is printed, and torchrun repeats nothing
