"""What records must be like: the filter of an entry of a meta file, and of a command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megavlm.data.records.reject import RejectError
from megavlm.data.records.scores import open_scores


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What records must be like; a bound that is None holds for all.

    Args:
        min_tokens, max_tokens: of the sample.
        min_side: fewest pixels of each image's shorter side.
        max_side: most pixels of each image's longer side.
        max_aspect: largest ratio of an image's longer to its shorter side.
        score: name of a field that holds a number, such as the similarity of image and caption.
        scores: folder of such numbers, which ``tools/score_dataset.py`` wrote.
        min_score, max_score: bounds of that number.
        drop_duplicates: leave out records whose image an earlier record has, as ``scores`` says.
    """

    min_tokens: float | None = None
    max_tokens: float | None = None
    min_side: float | None = None
    max_side: float | None = None
    max_aspect: float | None = None
    score: str | None = None
    scores: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    drop_duplicates: bool = False

    def check_record(self, record: Mapping[str, Any], path: str, line: int) -> None:
        """Refuse a record by its score; raises RejectError.

        Args:
            record: its fields.
            path: annotation file that it is from.
            line: line, row or number of the record in it, from 1.
        """
        if self.score is not None:
            value = record.get(self.score)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise RejectError("filtered_score", f"{self.score} is {value!r:.100}, not a number")
            _check("filtered_score", self.score, value, self.min_score, self.max_score)
        if self.scores is not None:
            scored = open_scores(self.scores).of(path)
            value = scored.score(line)
            if value is None:
                raise RejectError(
                    "filtered_unscored", f"{self.scores} has no score; its unscored.jsonl says why"
                )
            _check("filtered_score", "the score", value, self.min_score, self.max_score)
            if self.drop_duplicates and scored.is_duplicate(line):
                raise RejectError("filtered_duplicate", "an earlier record has nearly this image")

    def check_image(self, width: int, height: int) -> None:
        """Refuse a record by the size of an image; raises RejectError."""
        _check(
            "filtered_size",
            "pixels of an image's shorter side",
            min(width, height),
            self.min_side,
            None,
        )
        _check(
            "filtered_size",
            "pixels of an image's longer side",
            max(width, height),
            None,
            self.max_side,
        )
        _check(
            "filtered_aspect",
            "an image's aspect",
            max(width, height) / min(width, height),
            None,
            self.max_aspect,
        )

    def check_length(self, tokens: int) -> None:
        """Refuse a record by its length; raises RejectError."""
        _check("filtered_length", "tokens", tokens, self.min_tokens, self.max_tokens)


def read_filter(given: Any, where: str) -> Filter:
    """Read the filter of an entry of a meta file; raises ValueError, which begins with ``where``.
    Whether its ``scores`` are those of the files is for ``check_scores`` to say.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where}: must be an object, not {given!r:.200}")
    refuse_unknown(given, [entry.name for entry in fields(Filter)], where)
    names = {"score": "field", "scores": "folder"}
    for key, value in given.items():
        if key in names:
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: {key} {value!r} must be the name of a {names[key]}")
        elif key == "drop_duplicates":
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {key} {value!r} must be true or false")
        elif not is_number(value):
            raise ValueError(f"{where}: {key} {value!r} must be a number")
    bounds = {"min_score", "max_score"} & set(given)
    sources = set(names) & set(given)
    if len(sources) > 1:
        raise ValueError(f"{where}: score and scores exclude each other; keep one of them")
    is_dropping = given.get("drop_duplicates", False)
    if is_dropping and "scores" not in given:
        raise ValueError(f"{where}: drop_duplicates goes with scores")
    if bool(sources) != bool(bounds) and not (is_dropping and not bounds):
        raise ValueError(
            f"{where}: {'scores' if 'scores' in given else 'score'} goes with min_score or"
            " max_score"
        )
    return Filter(**given)


def parse_filter(words: Sequence[str], flag: str) -> Filter:
    """Read a filter of a command line, ``NAME=VALUE ...``; raises ValueError."""
    given: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or name in given:
            raise ValueError(f"{flag} {word}: must be NAME=VALUE, each NAME once")
        try:
            value = text if name in ("score", "scores") else json.loads(text)
        except ValueError:
            value = text
        given[name] = value
    return read_filter(given, flag)


def check_scores(keep: Filter, paths: Sequence[str], where: str) -> None:
    """Check that a filter's scores are those of some annotation files.

    Raises:
        FileNotFoundError, ValueError: they are not; begins with ``where``.
    """
    if keep.scores is None:
        return
    try:
        scores = open_scores(keep.scores)
        scores.check(paths)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    if keep.drop_duplicates and not scores.has_duplicates:
        raise ValueError(
            f"{where}: drop_duplicates: {keep.scores} was made with --duplicates 0, so that none"
            " are marked; score again, or leave it out"
        )


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ValueError for keys that are not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
        )


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number that a float can be."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _check(reason: str, what: str, value: float, least: float | None, most: float | None) -> None:
    """Raise RejectError for a value out of bounds."""
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = " and ".join(
            f"{word} {bound:g}"
            for word, bound in (("at least", least), ("at most", most))
            if bound is not None
        )
        raise RejectError(reason, f"{what}: {value:g}, wanted is {bounds}")
