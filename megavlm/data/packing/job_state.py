"""How far a job that reads records is, as a file: a crash at any moment loses the work since the
last save and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

from megavlm.data.records.reject import Reject
from megavlm.io import atomic
from megavlm.io.typed_json import build

State = TypeVar("State")
SHOWN_REJECTS = 5


def reject_lines(rejects: Iterable[Reject]) -> bytes:
    """Return rejected records as lines of JSON."""
    return "".join(
        json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects
    ).encode()


class DamagedStateError(ValueError):
    """A file of a stopped job is not as the job left it."""


def read_state(
    path: Path,
    kind: type[State],
    sources: int,
    of_source: Mapping[str, Any] = MappingProxyType({}),
) -> State | None:
    """Read what ``save_state`` wrote; none if there is nothing, or if a power cut left the file
    empty.

    Args:
        path: of the state.
        kind: its dataclass.
        sources: how many the job has.
        of_source: what earlier versions did not keep of each of them, and what it counts as.

    Raises:
        DamagedStateError: the file holds something else.
    """
    facts = atomic.read_json(path)
    if facts is None:
        return None
    if isinstance(listed := facts.get("sources"), list):
        facts["sources"] = [
            {**of_source, **one} if isinstance(one, dict) else one for one in listed
        ]
    try:
        state = build(kind, facts, str(path))
    except ValueError as error:
        raise DamagedStateError(error) from None
    if len(state.sources) != sources:
        raise DamagedStateError(f"{path}: tells of {len(state.sources)} sources, not of {sources}")
    return state


def check_length(path: Path, length: int) -> None:
    """Raise DamagedStateError if a file lacks some of the bytes that a state says are good."""
    found = path.stat().st_size if path.is_file() else 0
    if found < length:
        raise DamagedStateError(f"{path}: has {found} of {length} bytes")


def read_rejects(path: Path, length: int) -> list[Reject]:
    """Read the rejected records in the first bytes of a list.

    Raises:
        DamagedStateError: they are none.
    """
    with open(path, "rb") as file:
        lines = file.read(length).splitlines()
    try:
        return [
            build(Reject, json.loads(line), f"line {number}")
            for number, line in enumerate(lines, start=1)
        ]
    except ValueError as error:
        raise DamagedStateError(f"{path}: {error}") from None


def save_state(path: Path, state: Any, *files: BinaryIO) -> None:
    """Put files on the disk, and then the state that says how much of them is good.

    Args:
        path: of the state.
        state: a dataclass with the fields ``sources`` and ``first_rejects``, and others of JSON.
        files: open ones that it tells of.
    """
    for file in files:
        atomic.sync_file(file)
    atomic.write_text(path, json.dumps(state, ensure_ascii=False, default=_fields))


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name. Unlike ``dataclasses.asdict`` it copies nothing:
    a job has a hundred thousand sources, and saves them again and again.
    """
    return dataclasses.asdict(value) if isinstance(value, Reject) else vars(value)
