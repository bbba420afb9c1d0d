"""How far a job that reads records is, as a file: a crash at any moment loses the work since the
last save and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from megavlm.data.records.reject import Reject
from megavlm.io import atomic

SHOWN_REJECTS = 5


def reject_lines(rejects: Iterable[Reject]) -> bytes:
    """Return rejected records as lines of JSON."""
    return "".join(
        json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects
    ).encode()


def read_facts(path: Path, source: type) -> dict[str, Any] | None:
    """Read what ``save_state`` wrote; none if there is nothing, or if a power cut left the file
    empty.

    Args:
        path: of the file.
        source: dataclass of the entries of ``sources``.
    """
    facts = atomic.read_json(path)
    if facts is not None:
        facts["first_rejects"] = [Reject(**entry) for entry in facts["first_rejects"]]
        facts["sources"] = [source(**entry) for entry in facts["sources"]]
    return facts


def save_state(path: Path, state: Any, *files: BinaryIO) -> None:
    """Put files on the disk, and then the state that says how much of them is good.

    Args:
        path: of the state.
        state: a dataclass with the fields ``sources`` and ``first_rejects``, and others of JSON.
        files: open ones that it tells of.
    """
    for file in files:
        atomic.sync_file(file)
    atomic.write_text(path, json.dumps(dataclasses.asdict(state), ensure_ascii=False))
