"""Notices that the process of a rank has ended while the others go on.

A process that was killed says nothing. torchrun of its machine notices, and ends the other ranks of
that machine; those of other machines wait in a collective until it times out. So each rank looks
after the process of the next rank of its machine, and tells all of them through their key-value
store. ``lost_machines.py`` notices that a whole machine is gone, or the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from dataclasses import asdict

import torch.distributed as dist

from megavlm.config import torchrun
from megavlm.io import processes

_LOST = "lost"
_LONGEST_INTERVAL = 5.0


class LostRankWatch:
    """Ends this process soon after that of another rank has ended; as a context manager it starts
    and ends the thread that looks.

    Args:
        store: shared by all ranks of the run, by a connection of its own.
        rank: of this process in the world.
        local_rank, local_size: as for ``LostRanks``.
        seconds: how long this rank may go on, since it may be about to name a checkpoint, or to
            tell what went wrong.
    """

    def __init__(
        self, store: dist.Store, rank: int, local_rank: int, local_size: int, seconds: float
    ) -> None:
        self._store = store
        self._ranks = LostRanks(store, rank, local_rank, local_size)
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lost ranks", daemon=True)

    def __enter__(self) -> None:
        self._ranks.join()
        self._thread.start()

    def __exit__(self, kind: type | None, *exception) -> None:
        self._ended.set()
        if kind is None:
            with contextlib.suppress(RuntimeError):  # the store is gone, with those that are done
                self._ranks.leave()

    def _watch(self) -> None:
        interval = min(self._seconds / 4, _LONGEST_INTERVAL)
        lost = ""
        while not lost and not self._ended.wait(interval):
            with contextlib.suppress(RuntimeError):  # the store is gone: lost_machines.py
                lost = self._ranks.find()
        if not lost:
            return
        with contextlib.suppress(RuntimeError):
            if self._store.add("lost/teller", 1) == 1:
                print(
                    f"the process of {lost} has ended, and the run cannot go on without it; the"
                    f" others end in {self._seconds:g} s",
                    file=sys.stderr,
                    flush=True,
                )
        if not self._ended.wait(self._seconds):
            end_process(
                f"{lost} has ended, and this rank waited for it; why it did is above, or it was"
                " killed"
            )


class LostRanks:
    """What a rank knows of ranks that have ended too early.

    Args:
        store: shared by all ranks of the run.
        rank: of this process in the world.
        local_rank, local_size: of this process among the ranks of its machine, whose numbers in the
            world follow each other.
    """

    def __init__(self, store: dist.Store, rank: int, local_rank: int, local_size: int) -> None:
        self._store = store
        self._rank = rank
        self._next = rank - local_rank + (local_rank + 1) % local_size
        self._known: processes.ProcessId | None = None

    def join(self) -> None:
        """Say which process this rank is."""
        self._store.set(f"process/{self._rank}", json.dumps(asdict(processes.this_process())))

    def leave(self) -> None:
        """Say that this rank is done, and may end before the others."""
        self._store.set(f"done/{self._rank}", "")

    def find(self) -> str:
        """Return the first rank that was found to have ended too early, such as ``rank 3 (on
        node1)``, the same on all ranks; empty if none was. It takes one operation of the store, and
        at the start another one.
        """
        if self._has_next_ended() and not self._store.check([f"done/{self._next}"]):
            # Of several, one is told.
            self._store.compare_set(_LOST, "", f"rank {self._next} (on {socket.gethostname()})")
        return self._store.get(_LOST).decode() if self._store.check([_LOST]) else ""

    def _has_next_ended(self) -> bool:
        """Return whether the process of the next rank of this machine is gone, as far as can be
        told.
        """
        if self._next == self._rank:
            return False
        if self._known is None:
            key = f"process/{self._next}"
            if not self._store.check([key]):
                return False  # it has not begun
            self._known = processes.ProcessId(**json.loads(self._store.get(key)))
        return self._known.is_here and self._known.has_ended


def end_process(reason: str) -> None:
    """End this process, whose main thread waits in a collective that nothing can end."""
    torchrun.refuse(f"error on {torchrun.name_of_rank()}: {reason}", is_printed=False)
    os._exit(1)
