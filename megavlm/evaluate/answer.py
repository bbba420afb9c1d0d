"""The nouns of evaluation: an answer beside the truth, and what a metric says of many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered, and what is right.

    Args:
        prediction: the model's text.
        truth: right answers, or captions, at least one.
        choices: the choices of a question, in the order of their letters; empty: it has none.
    """

    prediction: str
    truth: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a metric says.

    Args:
        figures: by name; the first is the one that a model is judged by.
        each: the part of every answer, in their order; of POPE, whether it is right.
    """

    figures: dict[str, float]
    each: tuple[float, ...]


def mean(values: tuple[float, ...]) -> float:
    """Return the mean of the values, of which there is at least one."""
    return sum(values) / len(values)
