"""Answers to a task beside the truth: their figures, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.evaluate.answer import Answer, Score, mean
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.packs import TaskPacks
from megavlm.evaluate.task import Task
from megavlm.io import atomic

ANSWERS = "answers"
"""Folder of the answers of a run, in which each evaluation has one."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to a question.

    Args:
        text: what the model says, or the choice that it takes.
        tokens: that it wrote, with the one that ends the answer; empty: it took a choice.
    """

    text: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Graded:
    """How a task was answered.

    Args:
        figures: by name, ``TASK/FIGURE``.
        by_category: the first figure of each category, by the same name; empty without categories.
        rows: what the file of answers holds of each question.
    """

    figures: dict[str, float]
    by_category: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]


def written(task: TaskPacks, answers: Sequence[Sequence[int]]) -> list[Prediction]:
    """Return answers that a model wrote.

    Args:
        task: the questions.
        answers: tokens of each.
    """
    return [Prediction(text=task.text(tokens), tokens=tuple(tokens)) for tokens in answers]


def chosen(task: Task, choices: Sequence[int]) -> list[Prediction]:
    """Return answers that a model chose.

    Args:
        task: the questions.
        choices: index of the choice of each.
    """
    metric = METRICS[task.metric]
    return [
        Prediction(text=metric.choice(index, question.choices[index]))
        for index, question in zip(choices, task.questions, strict=True)
    ]


def grade(task: Task, given: Sequence[Prediction]) -> Graded:
    """Measure the answers to a task by its metric."""
    measure = METRICS[task.metric].score
    answers = [
        Answer(prediction=one.text, truth=question.truth, choices=question.choices)
        for question, one in zip(task.questions, given, strict=True)
    ]

    def figure_of(part: Sequence[int]) -> float:
        return next(iter(measure([answers[index] for index in part]).figures.values()))

    return _graded(task, given, measure(answers), figure_of)


def grade_pairs(task: Task, score: Score, nearest: Sequence[str]) -> Graded:
    """Return what a metric of pairs says of a task.

    Args:
        task: the images.
        score: of the metric.
        nearest: the text or class that each image is nearest to.
    """

    def figure_of(part: Sequence[int]) -> float:
        # Of a search among all images: the figure is the mean of their scores.
        return mean(tuple(score.each[index] for index in part))

    return _graded(task, [Prediction(text=text) for text in nearest], score, figure_of)


def _graded(
    task: Task,
    given: Sequence[Prediction],
    score: Score,
    figure_of: Callable[[Sequence[int]], float],
) -> Graded:
    """Put together what a metric says; ``figure_of`` returns the first figure of some questions."""
    parts: dict[str, list[int]] = {}
    for index, question in enumerate(task.questions):
        if question.category:
            parts.setdefault(question.category, []).append(index)
    by_category = {name: figure_of(part) for name, part in sorted(parts.items())}
    first = f"{task.name}/{next(iter(score.figures))}"
    return Graded(
        figures={f"{task.name}/{figure}": value for figure, value in score.figures.items()},
        by_category={first: by_category} if by_category else {},
        rows=_rows(task, given, score),
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write answers, a line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _rows(task: Task, given: Sequence[Prediction], score: Score) -> list[dict[str, Any]]:
    """Return the answers beside the truth, a row for each question."""
    return [
        {
            "id": question.name,
            "question": question.turns[-1].text if question.turns else "",
            "image": [str(image) for image in question.images],
            "prediction": one.text,
            "answers": list(question.truth),
            "score": value,
        }
        | ({"video": [each.video.file.path for each in question.videos]} if question.videos else {})
        | ({"tokens": list(one.tokens)} if one.tokens else {})
        for question, one, value in zip(task.questions, given, score.each, strict=True)
    ]
