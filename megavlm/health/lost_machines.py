"""Notices that a whole machine is lost: its power, its kernel or its network.

Nobody is left there who could say so. torchrun of the other machines does not notice, and their
ranks wait in a collective until it times out. So the ranks of each machine count together in the
ranks' key-value store, and each rank looks after the counter of another machine.

A counter that stands still is not enough to end a run: the machine may be slow, its processes may
be stopped, or Python there may be busy. A machine is lost if, all at once, its counter stands still
while this rank counts on, this rank's training makes no progress for as long, and the machine's
kernel does not take a connection, or says that the process which asked for connections is gone. No
clocks of different machines are compared, and time that this rank is stopped does not count.

The machine that serves the store may be the lost one. Then the operations of the store fail, or
never return, and the first rank of each machine tries a connection to the store's port instead.
The others of its machine end after it: torchrun may be waiting for the store too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megavlm.health.connections import Address, is_unanswered, reach
from megavlm.health.lost_ranks import end_process
from megavlm.health.rank_names import named
from megavlm.io import processes

_LOST = "lost"
_SHORTEST_INTERVAL = 1.0
_LONGEST_INTERVAL = 15.0
_BEATS = 12
_BACKLOG = 4096


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine says of itself when it begins.

    Args:
        host: its name.
        first: its first rank.
        size: its ranks, whose numbers follow each other.
        address, port: where its kernel takes connections for its first rank.
    """

    host: str
    first: int
    size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.host} ({named(range(self.first, self.first + self.size))})"


class Silence:
    """How long a counter has stood still, by the looks at it.

    Args:
        patience: looks after which it is long.
    """

    def __init__(self, patience: int) -> None:
        self._first_patience = patience
        self._patience = patience
        self._count: int | None = None
        self._looks = 0
        self._since = time.monotonic()

    def see(self, count: int) -> None:
        """Take note of what the counter shows now."""
        if count != self._count:
            self._count = count
            self._looks = 0
            self._patience = self._first_patience
            self._since = time.monotonic()
        else:
            self._looks += 1

    @property
    def is_long(self) -> bool:
        """Whether it is time to ask why."""
        return self._looks >= self._patience

    @property
    def is_half_as_long(self) -> bool:
        """Whether half of that time has gone by."""
        return 2 * self._looks >= self._patience

    @property
    def seconds(self) -> float:
        """Seconds since it was seen to move."""
        return time.monotonic() - self._since

    def bear(self) -> None:
        """Wait for as long again, since there was an answer. A process that is stopped accepts no
        connections, and its kernel keeps a limited number of them.
        """
        self._patience = 2 * self._looks


class Machines:
    """What a rank knows of other machines.

    Args:
        store: shared by all ranks of the run.
        rank, size: of this process in the world.
        local_rank, local_size: of this process among the ranks of its machine, whose numbers in the
            world follow each other.
        patience: beats of this rank without one of another machine after which it asks that one.
        store_at: where the store is served.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        patience: int,
        store_at: Address,
    ) -> None:
        self._store = store
        self._store_at = store_at
        self._is_first = local_rank == 0
        self._first = rank - local_rank
        self._size = local_size
        # The ranks of a machine look after different ones: neighbours may be lost together.
        machines = max(2, size // local_size)
        step = 1 + local_rank % (machines - 1)
        self._other = (self._first + step * local_size) % size
        self._patience = patience
        self._known: Machine | None = None
        self._silence = Silence(patience)
        self._at: Address | None = None
        self._is_found = False
        self._listener: socket.socket | None = None
        self._leader: processes.ProcessId | None = None

    def join(self) -> Address | None:
        """Let the first rank of a machine say where its kernel takes connections.

        Returns:
            Where the store is served, in numbers, on a first rank that can reach it.
        """
        if not self._is_first:
            return None
        store_at = None
        address = ""
        port = 0
        with contextlib.suppress(OSError):  # the others tell that they cannot reach it
            store_at, address = reach(self._store_at)
            if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                address = self._store_at[0]  # it is served here, and others know it by this name
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, backlog=_BACKLOG)
            self._listener.setblocking(False)
            port = self._listener.getsockname()[1]
        machine = Machine(
            host=socket.gethostname(),
            first=self._first,
            size=self._size,
            address=address,
            port=port,
        )
        self._store.set(f"process/{self._first}", json.dumps(asdict(processes.this_process())))
        self._store.set(f"machine/{self._first}", json.dumps(asdict(machine)))
        return store_at

    def leave(self) -> None:
        """Say that this rank is done, and may end before those of other machines."""
        self._store.add(f"done/{self._first}", 1)

    def close(self) -> None:
        """Take no more connections."""
        if self._listener is not None:
            self._listener.close()

    def beat(self, *, is_idle: bool) -> str:
        """Say that this machine is there, and look after the other one. It takes three operations
        of the store.

        Args:
            is_idle: whether the training of this rank makes no progress.

        Returns:
            What was first seen of a lost machine, the same on all ranks; empty if none is lost.
        """
        self._store.add(f"beats/{self._first}", 1)
        self._accept()
        self._meet()
        self._look()
        if is_idle and self._silence.is_long:
            self._ask()
        if not self._store.check([_LOST]):
            return ""
        if self._silence.is_half_as_long:
            self._ask()  # it may be lost too, and every rank ends now
        return self._store.get(_LOST).decode()

    def _accept(self) -> None:
        """Close the connections of those who asked."""
        while self._listener is not None:
            try:
                self._listener.accept()[0].close()
            except OSError:
                return  # there is no more

    def _meet(self) -> None:
        """Note which process the first rank of this machine is."""
        key = f"process/{self._first}"
        if not self._is_first and self._leader is None and self._store.check([key]):
            self._leader = processes.ProcessId(**json.loads(self._store.get(key)))

    @property
    def has_leader_ended(self) -> bool:
        """Whether the process of the first rank of this machine is gone, as far as can be told."""
        return self._leader is not None and self._leader.is_here and self._leader.has_ended

    def _look(self) -> None:
        """Look at the counter of the other machine."""
        if self._known is None:
            key = f"machine/{self._other}"
            if not self._store.check([key]):
                return  # it has not begun
            self._known = Machine(**json.loads(self._store.get(key)))
            with contextlib.suppress(OSError):
                self._at, _ = reach((self._known.address, self._known.port))
            if self._at is None:
                self._tell(
                    "unreachable",
                    f"{self._known}: no connection to {self._known.address}, port"
                    f" {self._known.port}; if the machine is lost, it will not be noticed",
                )
        self._silence.see(self._store.add(f"beats/{self._other}", 0))

    def _ask(self) -> None:
        """Find out whether a machine that is silent is lost, and tell all ranks if it is."""
        machine = self._known
        if machine is None or self._at is None or self._is_found:
            return
        if self._store.add(f"done/{self._other}", 0) >= machine.size:
            return
        seconds = self._silence.seconds
        if not is_unanswered(self._at):
            self._silence.bear()
            return
        self._is_found = True
        told = f"nothing was heard of {machine} for {seconds:.0f} s, and it takes no connection"
        self._tell(
            "lost",
            f"{told}: it is lost or cut off, or its ranks have ended; the run cannot go on and"
            " ends",
        )
        self._store.compare_set(_LOST, "", told)

    def _tell(self, kind: str, text: str) -> None:
        """Print what was seen of the other machine, of which several ranks may see the same."""
        if self._store.add(f"told/{kind}/{self._other}", 1) == 1:
            print(text, file=sys.stderr, flush=True)


class LostMachineWatch:
    """Ends this process after a machine is lost; as a context manager it starts and ends the
    threads that look.

    Args:
        store: shared by all ranks of the run.
        rank, size: of this process in the world.
        local_rank, local_size: of this process among the ranks of its machine.
        seconds: how long a machine may be silent.
        store_at: where the store is served.
        idle: returns for how many seconds the training of this rank has made no progress.
        of_all_ranks: errors that every rank raises, and after which it may end before the others.
        end: ends this process, and is told why.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        seconds: float,
        store_at: Address,
        idle: Callable[[], float],
        of_all_ranks: tuple[type[Exception], ...] = (),
        end: Callable[[str], None] = end_process,
    ) -> None:
        self._seconds = seconds
        self._interval = min(max(seconds / _BEATS, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        self._patience = math.ceil(seconds / self._interval)
        self._machines = Machines(
            store, rank, size, local_rank, local_size, self._patience, store_at
        )
        self._store_at = store_at
        self._idle = idle
        self._of_all_ranks = of_all_ranks
        self._end = end
        self._beats = 0
        self._ended = threading.Event()

    def __enter__(self) -> None:
        store_at = self._machines.join()
        threading.Thread(target=self._beat, name="lost machines", daemon=True).start()
        threading.Thread(
            target=self._watch_store, args=(store_at,), name="lost store", daemon=True
        ).start()

    def __exit__(self, kind: type | None, *exception) -> None:
        if kind is None or issubclass(kind, self._of_all_ranks):
            with contextlib.suppress(RuntimeError):  # the store is gone, with those that are done
                self._machines.leave()
        self._ended.set()
        self._machines.close()

    def _is_idle(self) -> bool:
        return self._idle() >= self._seconds

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            with contextlib.suppress(RuntimeError):  # the store is gone: see _watch_store
                lost = self._machines.beat(is_idle=self._is_idle())
                self._beats += 1
                if lost and not self._ended.is_set():
                    self._end(f"{lost}, and this rank waited for it")
                    return

    def _watch_store(self, store_at: Address | None) -> None:
        """End this process if the store answers no more, and the machine that serves it neither.

        Args:
            store_at: where it is served; none on ranks that are not the first of their machine, and
                if the first one cannot reach it.
        """
        silence = Silence(self._patience)
        while not self._ended.wait(self._interval):
            silence.see(self._beats)
            if not (silence.is_long and self._is_idle()):
                continue
            if self._machines.has_leader_ended and not self._ended.is_set():
                self._end(
                    "the key-value store does not answer, and the first rank of this machine has"
                    " ended"
                )
                return
            if store_at is None:
                continue
            if not is_unanswered(store_at):
                silence.bear()
            elif not self._ended.is_set():
                told = (
                    f"the key-value store at {self._store_at[0]}, port {self._store_at[1]}, has not"
                    f" answered for {silence.seconds:.0f} s, and takes no connection: its machine"
                    " is lost or cut off, or torchrun has ended there; the run cannot go on and"
                    " ends"
                )
                print(told, file=sys.stderr, flush=True)  # nobody can tell the others
                self._end(told)
                return
