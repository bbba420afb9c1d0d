"""Notices that a run hangs, and says which rank keeps the others waiting, and where.

In a run that hangs nearly every rank waits in a collective for one that does not come, until the
collective times out half an hour later with a message of whoever waited first. So every rank has a
thread that looks how long ago its training thread last made progress. When that is far longer than
usual it raises an alarm in the ranks' key-value store; all ranks answer with what they are doing,
which collectives they wait in, and their Python stacks; and one of them prints it, sorted. A rank
that does not answer is frozen or gone. Nothing is ended: that is left to the collectives' timeout.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch.distributed as dist

from megavlm.config.schema import Health
from megavlm.health.diagnostics import pending, stacks
from megavlm.health.rank_names import named

_REMEMBERED = 200
_LONGEST_INTERVAL = 5.0
_MOST_GROUPS = 8
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A sign of progress.

    Args:
        what: step, evaluation or checkpoint.
        step: its number.
        packs: packs of the step that have been loaded on this rank.
        is_loading: whether it waits for the next pack.
        time: when, in seconds of the monotonic clock.
    """

    what: str
    step: int
    packs: int = 0
    is_loading: bool = False
    time: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        if self.is_loading:
            return f"{self.what} {self.step}, waits for pack {self.packs + 1}"
        if self.packs:
            return f"{self.what} {self.step}, pack {self.packs} came last"
        return f"{self.what} {self.step}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a rank says when there is an alarm.

    Args:
        host: its machine.
        doing: its last sign of progress, in words.
        progress: step and pack, to be compared.
        waits_in: collectives that have not ended, the oldest first.
        stacks: its Python stacks.
    """

    host: str
    doing: str
    progress: tuple[int, int]
    waits_in: tuple[str, ...]
    stacks: str


class Watchdog:
    """Watches one rank; as a context manager it starts and ends the thread that does.

    Args:
        store: shared by all ranks of the run.
        rank, size: of this process in the world.
        health: when to raise an alarm.
        timeout_minutes: of collectives; half of it is the longest that is ever waited before an
            alarm.
        tell: what prints a report.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        health: Health,
        timeout_minutes: int,
        tell: Callable[[str], None] | None = None,
    ):
        self._store = store
        self._rank = rank
        self._size = size
        self._health = health
        self._tell = tell or _print
        self._longest_limit = timeout_minutes * 60 / 2
        self._interval = min(health.hang_seconds / 4, _LONGEST_INTERVAL)
        self._mark = Mark(what="start", step=0)
        self._waits: dict[str, deque[float]] = {}
        self._known: set[str] = set()  # kinds of which one has ended
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._answered = 0  # number of the last alarm
        self._alarmed: Mark | None = None  # where this rank was then
        self._told: Mark | None = None  # the same, on the rank that told it

    def __enter__(self) -> Watchdog:
        self._mark = Mark(what="start", step=0)
        if self._health.hang_factor:
            self._answered = self._store.add("alarm", 0)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._interval)

    def enter(self, what: str, step: int) -> None:
        """Note that a step, an evaluation or a checkpoint begins, or that it goes on."""
        before = self._mark
        self._note(Mark(what=what, step=step))
        if (before.what, before.step) != (what, step):
            self._known.add(before.what)

    def count(self, packs: Iterable[_Item]) -> Iterator[_Item]:
        """Pass ``packs`` on, and note when each was asked for and when it came."""
        packs = iter(packs)
        end = object()
        while True:
            before = self._mark
            self._note(
                Mark(what=before.what, step=before.step, packs=before.packs, is_loading=True)
            )
            pack = next(packs, end)
            if pack is end:
                return
            self._note(Mark(what=before.what, step=before.step, packs=before.packs + 1))
            yield pack

    def idle(self) -> float:
        """Return for how many seconds there has been no sign of progress."""
        return time.monotonic() - self._mark.time

    def limit(self, what: str) -> float:
        """Seconds without progress after which there is an alarm, from the longest waits so far. In
        the first step, evaluation or checkpoint the longest one may be still to come.
        """
        usual = self._health.hang_seconds
        if what in self._known:
            usual = max(self._waits[what])
        return min(
            max(self._health.hang_seconds, self._health.hang_factor * usual), self._longest_limit
        )

    def _note(self, mark: Mark) -> None:
        before = self._mark
        self._mark = mark
        self._waits.setdefault(before.what, deque(maxlen=_REMEMBERED)).append(
            mark.time - before.time
        )

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._see_progress()
            try:
                self._see_alarm()
            except RuntimeError as error:  # the store is gone, with the machine that served it
                if self._is_late():
                    self._alarmed = self._mark
                    self._tell(
                        f"rank {self._rank} makes no progress and cannot ask the others ({error});"
                        f" {self._mark}\n{stacks()}"
                    )
        self._see_progress()

    def _see_progress(self) -> None:
        """Report that a hung run continued."""
        if self._told is not None and self._mark is not self._told:
            self._tell(
                f"the run continued, {self._mark.time - self._told.time:.0f} s after {self._told}"
            )
            self._told = None

    def _see_alarm(self) -> None:
        """Raise an alarm if this rank is late; answer one that anybody raised."""
        mark = self._mark
        if self._is_late():
            # Ranks that raise an alarm at the same time raise the same one.
            number = int(
                self._store.compare_set("alarm", str(self._answered), str(self._answered + 1))
            )
        else:
            number = self._store.add("alarm", 0)
        if number <= self._answered:
            return
        self._alarmed = mark
        self._answered = number
        self._store.set(f"answer/{number}/{self._rank}", json.dumps(asdict(self._answer(mark))))
        if self._store.add(f"teller/{number}", 1) == 1:
            self._tell(report(self._collect(number), self._size, time.monotonic() - mark.time))
            self._told = mark
            for key in self._answers_to(number):  # kilobytes of each rank
                self._store.delete_key(key)

    def _is_late(self) -> bool:
        """Whether there is an alarm to raise; one is enough for each sign of progress that is
        missed.
        """
        return self._mark is not self._alarmed and self.idle() > self.limit(self._mark.what)

    def _answer(self, mark: Mark) -> Answer:
        return Answer(
            host=socket.gethostname(),
            doing=str(mark),
            progress=(mark.step, mark.packs),
            waits_in=tuple(map(str, pending())),
            stacks=stacks(),
        )

    def _answers_to(self, number: int) -> list[str]:
        """Return the store's keys of all ranks' answers to an alarm."""
        return [f"answer/{number}/{rank}" for rank in range(self._size)]

    def _collect(self, number: int) -> dict[int, Answer]:
        """Collect the answers of the ranks that answer in time."""
        keys = dict(enumerate(self._answers_to(number)))
        patience = time.monotonic() + 3 * self._interval + 1
        while not self._store.check(list(keys.values())) and time.monotonic() < patience:
            time.sleep(self._interval / 4)
        return {
            rank: Answer(**json.loads(self._store.get(key)))
            for rank, key in keys.items()
            if self._store.check([key])
        }


def report(answers: dict[int, Answer], size: int, idle: float) -> str:
    """Describe a run that hangs: the rank that the others wait for first, then what every rank
    does.

    Args:
        answers: of the ranks that answered.
        size: ranks of the run.
        idle: seconds since the rank that tells it made progress.
    """
    silent = [rank for rank in range(size) if rank not in answers]
    groups: dict[tuple, list[int]] = {}
    for rank, answer in answers.items():
        # Lines of a stack differ between ranks that wait for the same; where they wait and after
        # which pack does not.
        groups.setdefault(
            (
                bool(answer.waits_in),
                tuple(answer.progress),
                answer.doing,
                tuple(answer.waits_in[:1]),
            ),
            [],
        ).append(rank)
    lines = [f"the run has made no progress for {idle:.0f} s; {_suspects(answers, silent)}"]
    if silent:
        lines.append(
            f"{named(silent)}: no answer; the process is frozen or dead, or its node cannot be"
            " reached"
        )
    for (_, _, doing, waits_in), ranks in sorted(groups.items())[:_MOST_GROUPS]:
        first = answers[ranks[0]]
        lines.append(
            f"{named(ranks)} (on {first.host}): {doing};"
            f" {f'in {waits_in[0]}' if waits_in else 'in no collective'}"
        )
        lines += [f"    {line}" for line in first.stacks.splitlines()]
    if len(groups) > _MOST_GROUPS:
        lines.append(f"and {len(groups) - _MOST_GROUPS} more groups of ranks, further on")
    return "\n".join(lines)


def _suspects(answers: dict[int, Answer], silent: list[int]) -> str:
    """Whom the others wait for, if that can be told."""
    idle = [rank for rank, answer in answers.items() if not answer.waits_in]
    least = min((tuple(answer.progress) for answer in answers.values()), default=(0, 0))
    behind = [rank for rank, answer in answers.items() if tuple(answer.progress) == least]
    for ranks, why in (
        (silent, "not answering"),
        (idle, "in no collective"),
        (behind, "behind the others"),
    ):
        if 0 < len(ranks) < len(answers) + len(silent):
            return f"it waits for {named(ranks)}, {why}"
    return "all ranks wait at the same point"


def _print(text: str) -> None:
    print(f"watchdog: {text}", file=sys.stderr, flush=True)
