"""The annotation files of a job, for its workers: in a file that each reads once. Ten thousand of
them, sent with each of up to 16,384 shards, would keep the main process busy for ten minutes.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megavlm.data.records.meta_file import Annotations

FILE_NAME = "sources.pickle"


@dataclass(frozen=True, kw_only=True)
class SourceList:
    """Where the annotation files of a job are listed.

    Args:
        path: of the list.
        digest: of its content, which tells it from another one that was there before.
    """

    path: Path
    digest: str

    def read(self) -> tuple[Annotations, ...]:
        """Read the list; a process does so once."""
        return _read(self)


def write_sources(folder: Path, sources: Sequence[Annotations]) -> SourceList:
    """Write the list of a job into its work folder."""
    content = pickle.dumps(tuple(sources))
    path = folder / FILE_NAME
    path.write_bytes(content)
    return SourceList(path=path, digest=hashlib.sha256(content).hexdigest())


@lru_cache(maxsize=1)
def _read(listed: SourceList) -> tuple[Annotations, ...]:
    return pickle.loads(listed.path.read_bytes())
