"""Answers to a task beside the truth: their figures, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.evaluate.answer import Answer, Score, mean
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.packs import TaskPacks
from megavlm.evaluate.task import Question, Task
from megavlm.io import atomic

ANSWERS = "answers"
"""Folder of the answers of a run, in which each evaluation has one."""


@dataclass(frozen=True, kw_only=True)
class Given:
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


def written(task: TaskPacks, answers: Sequence[Sequence[int]]) -> list[Given]:
    """Return answers that a model wrote.

    Args:
        task: the questions.
        answers: tokens of each.
    """
    return [Given(text=task.text(tokens), tokens=tuple(tokens)) for tokens in answers]


def chosen(task: Task, choices: Sequence[int]) -> list[Given]:
    """Return answers that a model chose.

    Args:
        task: the questions.
        choices: index of the choice of each.
    """
    metric = METRICS[task.metric]
    return [
        Given(text=metric.choice(index, question.choices[index]))
        for index, question in zip(choices, task.questions, strict=True)
    ]


def grade(task: Task, given: Sequence[Given]) -> Graded:
    """Measure the answers to a task by its metric."""
    score = METRICS[task.metric].score(list(map(_answer, task.questions, given)))
    return Graded(
        figures={f"{task.name}/{figure}": value for figure, value in score.figures.items()},
        by_category=_categories(task, given, next(iter(score.figures))),
        rows=_rows(task, given, score),
    )


def grade_pairs(task: Task, score: Score, nearest: Sequence[str]) -> Graded:
    """Return what a metric of pairs says of a task.

    Args:
        task: the images.
        score: of the metric.
        nearest: the text or class that each image is nearest to.
    """
    first = f"{task.name}/{next(iter(score.figures))}"
    of_categories: dict[str, list[float]] = {}
    for question, one in zip(task.questions, score.each, strict=True):
        of_categories.setdefault(question.category, []).append(one)
    # Of a search among all images: the figure is the mean of their scores.
    found = {name: mean(tuple(each)) for name, each in sorted(of_categories.items()) if name}
    return Graded(
        figures={f"{task.name}/{figure}": value for figure, value in score.figures.items()},
        by_category={first: found} if found else {},
        rows=_rows(task, [Given(text=text) for text in nearest], score),
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write answers, a line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answer(question: Question, given: Given) -> Answer:
    return Answer(prediction=given.text, truth=question.truth, choices=question.choices)


def _categories(task: Task, given: Sequence[Given], figure: str) -> dict[str, dict[str, float]]:
    """Return a figure of each category of the questions."""
    found = {}
    for category in sorted({question.category for question in task.questions} - {""}):
        answers = [
            _answer(question, one)
            for question, one in zip(task.questions, given, strict=True)
            if question.category == category
        ]
        found[category] = METRICS[task.metric].score(answers).figures[figure]
    return {f"{task.name}/{figure}": found} if found else {}


def _rows(task: Task, given: Sequence[Given], score: Score) -> list[dict[str, Any]]:
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
