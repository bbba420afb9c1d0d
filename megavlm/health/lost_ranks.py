"""Notices that the process of a rank has ended while the others train.

A process that was killed says nothing. torchrun of its machine notices, and ends the other ranks of
that machine; those of other machines wait in a collective until it times out. So each rank looks
after the process of the next rank of its machine, and tells all of them through their key-value
store.
"""

from __future__ import annotations

import json
import os
import socket

import torch.distributed as dist

from megavlm.io import processes

_LOST = "lost"


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
        self._known: list[str] = []

    def join(self) -> None:
        """Say which process this rank is."""
        self._store.set(f"process/{self._rank}", json.dumps(_identity(os.getpid())))

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
        if not self._known:
            key = f"process/{self._next}"
            if not self._store.check([key]):
                return False  # it has not begun to train
            self._known = json.loads(self._store.get(key))
        boot, namespace, pid, started = self._known
        if not boot or not namespace or [boot, namespace] != _identity(os.getpid())[:2]:
            return False  # its number means nothing here
        return processes.start_ticks(int(pid)) != started


def _identity(pid: int) -> list[str]:
    """Return what tells a process from others: boot, namespace, number and start."""
    started = processes.start_ticks(pid) or ""
    return [processes.boot_id(), processes.namespace_id(), str(pid), started]
