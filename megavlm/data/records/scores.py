"""Scores of records, which ``tools/score_dataset.py`` writes: how similar image and text are, and
which images were there before.

A folder of scores holds ``scores.json`` and, for the annotation file with the index 3 in its list
``sources``, ``00003.scores.npy`` (float32, one for each line, row or number of a record, from the
first; NaN: no score), ``00003.duplicates.npy`` (bool, likewise; absent if duplicates were not
looked for) and ``00003.places.npy`` (int64, likewise, with -1 for no score; absent if places were
not asked for).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.io.remote import file_state, is_remote

FORMAT = "megavlm-scores"
VERSION = 1
FILE_NAME = "scores.json"


@dataclass(frozen=True, kw_only=True)
class ScoredFile:
    """The scores of the records of one annotation file.

    Args:
        scores: float32 [lines], NaN where a record has none.
        duplicates: bool [lines], images that an earlier record has; none: nobody looked.
        places: int64 [lines], among all records, on a path with similar images side by side; -1:
            no place; none: nobody asked.
    """

    scores: np.ndarray
    duplicates: np.ndarray | None
    places: np.ndarray | None = None

    def score(self, line: int) -> float | None:
        """Return the score of the record at a line, row or number, from 1; None if it has none."""
        found = float(self.scores[line - 1]) if line <= len(self.scores) else np.nan
        return None if np.isnan(found) else found

    def is_duplicate(self, line: int) -> bool:
        """Return whether an earlier record has nearly the same image."""
        found = self.duplicates
        return found is not None and line <= len(found) and bool(found[line - 1])


class Scores:
    """A folder of scores; arrays are mapped into memory.

    Args:
        folder: that ``tools/score_dataset.py`` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or of a newer format.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        path = self.folder / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"scores {folder}: has no {FILE_NAME}; name the --out of tools/score_dataset.py"
            )
        content = path.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        try:
            self.facts: dict[str, Any] = json.loads(content.decode())
            is_known = (self.facts["format"], self.facts["version"]) == (FORMAT, VERSION)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"scores {path}: not a file of scores ({error})") from None
        if not is_known:
            raise ValueError(f"scores {path}: of another format than {FORMAT} {VERSION}")
        self._numbers = {source["path"]: i for i, source in enumerate(self.facts["sources"])}
        self._opened: dict[int, ScoredFile] = {}

    @property
    def has_duplicates(self) -> bool:
        """Whether records with an image that was there before are marked."""
        return self.facts["duplicates"] is not None

    @property
    def has_places(self) -> bool:
        """Whether records have places on a path with similar images side by side."""
        return bool(self.facts.get("places"))

    def of(self, path: str) -> ScoredFile:
        """Return the scores of an annotation file; raises ValueError if they are not here."""
        number = self._number(path)
        if number not in self._opened:
            duplicates = self._array(number, "duplicates") if self.has_duplicates else None
            self._opened[number] = ScoredFile(
                scores=self._array(number, "scores"),
                duplicates=duplicates,
                places=self._array(number, "places") if self.has_places else None,
            )
        return self._opened[number]

    def check(self, paths: Iterable[str]) -> None:
        """Raise ValueError for an annotation file that is not scored here, or has changed since."""
        for path in paths:
            known = self.facts["sources"][self._number(path)]
            state = file_state(path)
            if (known["bytes"], known["modified"]) != (state.size, state.version):
                raise ValueError(
                    f"scores {self.folder}: {path} has changed since it was scored; run"
                    " tools/score_dataset.py again"
                )
            self.of(path)

    def _number(self, path: str) -> int:
        number = self._numbers.get(full_path(path))
        if number is None:
            raise ValueError(
                f"scores {self.folder}: has no scores of {path}; it has those of"
                f" {', '.join(list(self._numbers)[:3])}"
            )
        return number

    def _array(self, number: int, what: str) -> np.ndarray:
        path = self.folder / array_name(number, what)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"scores {path}: cannot be read ({error})") from None


@lru_cache(maxsize=16)
def open_scores(folder: str) -> Scores:
    """Open a folder of scores, once in a process; errors as of ``Scores``."""
    return Scores(folder)


def array_name(number: int, what: str) -> str:
    """Return the name of the file with the ``scores``, ``duplicates`` or ``places`` of a source."""
    return f"{number:05d}.{what}.npy"


def full_path(path: str) -> str:
    """Return the path of an annotation file by which its scores are found."""
    return path if is_remote(path) else os.path.realpath(path)
