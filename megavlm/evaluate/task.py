"""Tasks: questions with their right answers, in JSONL files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.data.records.record import IMAGE_PLACEHOLDER, Turn
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.short_answers import LETTERS

_KEYS = (
    *("question", "answer", "answers", "image", "choices", "system"),
    *("id", "metric", "category"),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a task.

    Args:
        name: its ``id`` in the file, or the number of its line.
        line: its line in the file, from 1.
        turns: what stands before the answer: system (optional) and human.
        images: paths of its images, in the order of their placeholders.
        truth: right answers.
        choices: of which the model takes the likeliest; empty: it answers freely.
        category: figures are given for each, too; empty: none.
    """

    name: str
    line: int
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]
    truth: tuple[str, ...]
    choices: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of a file.

    Args:
        name: the file's name without its ending.
        path: the file.
        metric: row of ``METRICS``.
        questions: in the file's order.
    """

    name: str
    path: Path
    metric: str
    questions: tuple[Question, ...]

    def where(self, question: Question) -> str:
        """Return the file and line of a question."""
        return f"{self.path}:{question.line}"


def read_tasks(paths: tuple[str, ...]) -> tuple[Task, ...]:
    """Read the files of ``--eval.tasks``.

    Raises:
        ValueError: a file that is not there, a line that is no question, or two tasks of one name.
    """
    tasks = tuple(read_task(Path(path)) for path in paths)
    names = Counter(task.name for task in tasks)
    for task in tasks:
        if names[task.name] > 1:
            raise ValueError(
                f"--eval.tasks: {names[task.name]} files are called {task.name}; figures go by"
                " these names, so rename one"
            )
    return tasks


def read_task(path: Path, flag: str = "--eval.tasks") -> Task:
    """Read a task.

    Args:
        path: of the file.
        flag: the option that names it, for errors.

    Raises:
        ValueError: the file is not there, or a line is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error})") from None
    questions = []
    metrics: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = _parsed(line)
            questions.append(_question(fields, number, path.parent))
        except ValueError as error:
            raise ValueError(f"{flag} {path}:{number}: {error}") from None
        metrics.setdefault(_text(fields, "metric") or "exact_match", number)
    if not questions:
        raise ValueError(f"{flag} {path}: has no question")
    if len(metrics) > 1:
        told = ", ".join(f"{metric} in line {line}" for metric, line in metrics.items())
        raise ValueError(f"{flag} {path}: one file has one metric, but here are {told}")
    metric = next(iter(metrics))
    if metric in METRICS and METRICS[metric].needs_choices:
        questions = list(map(_with_listed_choices, questions))
    task = Task(name=path.stem, path=path, metric=metric, questions=tuple(questions))
    for problem in _problems(task):
        raise ValueError(f"{flag} {problem}")
    return task


def _parsed(line: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object with a question and its answer")
    unknown = sorted(set(fields) - set(_KEYS))
    if unknown:
        raise ValueError(f"has {', '.join(unknown)}; the keys of a question are {', '.join(_KEYS)}")
    return fields


def _question(fields: Mapping[str, Any], line: int, folder: Path) -> Question:
    text = _text(fields, "question")
    if not text:
        raise ValueError("has no question")
    images = _texts(fields, "image")
    if len(images) == 1 and IMAGE_PLACEHOLDER not in text:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    if text.count(IMAGE_PLACEHOLDER) != len(images):
        raise ValueError(
            f"has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} in its question, but"
            f" {len(images)} images"
        )
    for image in images:
        if not (folder / image).is_file():
            raise ValueError(f"its image {folder / image} is missing")
    if "answer" in fields and "answers" in fields:
        raise ValueError("has both answer and answers; keep one of them")
    truth = _texts(fields, "answers" if "answers" in fields else "answer")
    if not truth:
        raise ValueError("has no answer")
    turns = [Turn(role="human", text=text)]
    if "system" in fields:
        turns.insert(0, Turn(role="system", text=_text(fields, "system")))
    return Question(
        name=str(fields.get("id", line)),
        line=line,
        turns=tuple(turns),
        images=tuple(folder / image for image in images),
        truth=truth,
        choices=_texts(fields, "choices"),
        category=_text(fields, "category"),
    )


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} is {json.dumps(value)}, not a text")
    return value


def _texts(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{key} is {json.dumps(value)}, not a text or a list of texts")
    return tuple(values)


def _with_listed_choices(question: Question) -> Question:
    """Return the question with a line for each choice, unless its text lists them already."""
    *others, asked = question.turns
    listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False)]
    is_listed = all(text in asked.text for text in question.choices)
    text = asked.text if is_listed else "\n".join([asked.text, *listed])
    return replace(question, turns=(*others, replace(asked, text=text)))


def _problems(task: Task) -> Iterator[str]:
    """Report what is wrong with the questions together."""
    if task.metric not in METRICS:
        yield (
            f"{task.path}: there is no metric {task.metric}; the metrics are {', '.join(METRICS)}"
        )
        return
    with_choices = [question for question in task.questions if question.choices]
    if 0 < len(with_choices) < len(task.questions):
        yield (
            f"{task.where(with_choices[0])}: has choices, but other questions of the file have"
            " none; split the file"
        )
    names = Counter(question.name for question in task.questions)
    for question in task.questions:
        if names[question.name] > 1:
            yield f"{task.where(question)}: {names[question.name]} questions have the id" + (
                f" {question.name}"
            )
        if METRICS[task.metric].needs_choices and len(question.choices) < 2:
            yield f"{task.where(question)}: the metric {task.metric} needs choices, two or more"
        if question.choices:
            letters = LETTERS[: len(question.choices)] if METRICS[task.metric].needs_choices else ""
            if len(question.choices) > len(LETTERS):
                yield f"{task.where(question)}: more than {len(LETTERS)} choices"
            for letter, text in zip(letters, question.choices, strict=False):
                if text in letters and text != letter:
                    yield f"{task.where(question)}: its choice {letter} is called {text}"
            unknown = sorted(set(question.truth) - set(question.choices) - set(letters))
            if unknown:
                yield (f"{task.where(question)}: its answer {unknown[0]!r} is none of its choices")
