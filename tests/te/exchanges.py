"""What ranks send each other in a step, in the order in which they ask for it, and whether NCCL
would come to the end of it.

A communicator of NCCL runs what it is asked for one after the other, on every rank of it. A rank
that waits, as after each exchange that is not asynchronous, goes on when that exchange is done. So
two ranks that ask in different orders hang, where gloo, whose messages wait for each other one by
one, may still come through.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]
COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_to_all_single",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
)


class Exchanges:
    """Stands in for torch's functions that exchange tensors, and notes each call in ``lines``.

    A line asks for an exchange (``kind``, ``number``, ``group``, ``ranks``, and ``sizes`` or
    ``messages``), or waits for the one with a number.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._asked = 0
        self._together: list[Line] | None = None

    def install(self, dist: Any) -> None:
        """Replace the functions of ``torch.distributed``."""
        self._dist = dist
        for name in COLLECTIVES:
            setattr(dist, name, self._collective(name, getattr(dist, name)))
        dist.P2POp = _Message
        dist.isend = lambda tensor, dst=None, group=None: self._pair("isend", tensor, dst)
        dist.irecv = lambda tensor, src=None, group=None: self._pair("irecv", tensor, src)
        dist.batch_isend_irecv = self._batch
        dist._coalescing_manager = self._coalesce
        dist.distributed_c10d._coalescing_manager = self._coalesce

    def _collective(self, name: str, original: Callable) -> Callable:
        signature = inspect.signature(original)

        def exchange(*args: Any, **settings: Any) -> _Request | None:
            given = signature.bind(*args, **settings)
            given.apply_defaults()
            values = given.arguments
            tensors = [one for one in values.values() if hasattr(one, "numel")]
            line = {"kind": name, "sizes": [one.numel() for one in tensors]}
            if self._together is not None:
                self._together.append(line)
                return None
            request = self._ask(line, values["group"])
            return request if values["async_op"] else request.wait()

        return exchange

    @contextlib.contextmanager
    def _coalesce(
        self, group: Any = None, device: Any = None, async_ops: bool = False
    ) -> Iterator[_Request]:
        request = _Request(self)
        self._together = []
        yield request
        parts = self._together
        self._together = None
        if parts:
            kinds = "+".join(part["kind"] for part in parts)
            sizes = [size for part in parts for size in part["sizes"]]
            request.number = self._ask({"kind": kinds, "sizes": sizes}, group).number
            if not async_ops:
                request.wait()

    def _batch(self, operations: Sequence[_Message]) -> list[_Request]:
        messages = [
            ("send" if one.op is self._dist.isend else "receive", one.peer, one.tensor.numel())
            for one in operations
        ]
        return [self._ask({"kind": "messages", "messages": messages}, operations[0].group)]

    def _pair(self, name: str, tensor: Any, peer: int) -> _Request:
        way = "send" if name == "isend" else "receive"
        line = {"kind": "messages", "messages": [(way, peer, tensor.numel())]}
        pair = sorted((peer, self._dist.get_rank()))
        return self._add(line | {"group": f"pair {pair}", "ranks": pair})

    def _ask(self, line: Line, group: Any) -> _Request:
        group = group or self._dist.group.WORLD
        ranks = self._dist.get_process_group_ranks(group)
        return self._add(line | {"group": f"{group.group_name} {ranks}", "ranks": ranks})

    def _add(self, line: Line) -> _Request:
        self._asked += 1
        self.lines.append(line | {"number": self._asked})
        return _Request(self, self._asked)


@dataclass
class _Message:
    """Stands for ``torch.distributed.P2POp``."""

    op: Callable
    tensor: Any
    peer: int
    group: Any = None


class _Request:
    """What torch returns for an exchange that is on its way."""

    def __init__(self, exchanges: Exchanges, number: int = 0) -> None:
        self.number = number
        self._exchanges = exchanges

    def wait(self, *args: Any) -> None:
        """Note that the rank waits."""
        if self.number:
            self._exchanges.lines.append({"kind": "wait", "number": self.number})


@dataclass
class _Rank:
    """How far a rank has come.

    Args:
        lines: of it.
        place: of the next line.
        queues: of each communicator, what it was asked for and has not done.
        done: numbers of exchanges.
    """

    lines: Sequence[Line]
    place: int = 0
    queues: dict[str, deque[Line]] = field(default_factory=lambda: defaultdict(deque))
    done: set[int] = field(default_factory=set)

    def proceed(self) -> None:
        """Ask, until something has to be waited for."""
        while self.place < len(self.lines):
            line = self.lines[self.place]
            if line["kind"] == "wait" and line["number"] not in self.done:
                return
            if line["kind"] != "wait":
                left = [list(message) for message in line.get("messages", ())]
                self.queues[line["group"]].append(line | {"left": left})
            self.place += 1

    def finish(self, group: str) -> None:
        """End what the communicator has in front."""
        self.done.add(self.queues[group].popleft()["number"])

    def told(self) -> str:
        """Say what the rank waits for."""
        if self.place == len(self.lines):
            return "at the end"
        number = self.lines[self.place]["number"]
        (line,) = (line for line in self.lines if line.get("number") == number and "group" in line)
        return f"line {self.place}: {json.dumps(line)}"


def hang(lines: Sequence[Sequence[Line]]) -> str:
    """Say where ranks would wait for ever, given what each asks for; nothing: they come through."""
    ranks = [_Rank(one) for one in lines]
    while True:
        for rank in ranks:
            rank.proceed()
        groups = dict.fromkeys(group for rank in ranks for group in rank.queues)
        if not any([_advance(ranks, group) for group in groups]):
            break
    if all(rank.place == len(rank.lines) and not any(rank.queues.values()) for rank in ranks):
        return ""
    return "\n".join(f"rank {number}: {rank.told()}" for number, rank in enumerate(ranks))


def _advance(ranks: Sequence[_Rank], group: str) -> bool:
    """Run what the communicator's ranks have in front, if they agree; tell whether any ended."""
    heads = {
        number: rank.queues[group][0] for number, rank in enumerate(ranks) if rank.queues.get(group)
    }
    for number, head in heads.items():
        for message in list(head["left"]):
            (way, peer, size) = message
            answer = ["send" if way == "receive" else "receive", number, size]
            if answer in heads.get(peer, {"left": ()})["left"]:
                heads[peer]["left"].remove(answer)
                head["left"].remove(message)
    ended = [n for n, head in heads.items() if head["kind"] == "messages" and not head["left"]]
    first = next(iter(heads.values()), None)
    if (
        first
        and all(
            number in heads
            and (heads[number]["kind"], heads[number].get("sizes"))
            == (first["kind"], first.get("sizes"))
            for number in first["ranks"]
        )
        and first["kind"] != "messages"
    ):
        ended = first["ranks"]
    for number in ended:
        ranks[number].finish(group)
    return bool(ended)
