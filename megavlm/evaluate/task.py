"""Tasks: questions with their right answers, in JSONL files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.data.images.frame_sampling import MOST_FRAMES
from megavlm.data.records.media_fields import read_videos
from megavlm.data.records.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn, Video
from megavlm.data.records.reject import RejectError
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.pair_metrics import PAIR_METRICS
from megavlm.evaluate.short_answers import LETTERS

_KEYS = (
    *("question", "answer", "answers", "image", "video", "frames", "clip", "choices", "system"),
    *("id", "metric", "category", "templates"),
)
_VIDEO_KEYS = ("video", "frames", "clip")

USUAL_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class AskedVideo:
    """A video of a question.

    Args:
        video: the file or folder, and the part of it.
        frames: most frames that are shown, from the middles of equal parts.
    """

    video: Video
    frames: int = USUAL_FRAMES


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a task.

    Args:
        name: its ``id`` in the file, or the number of its line.
        line: its line in the file, from 1.
        turns: what stands before the answer: system (optional) and human.
        images: paths of its images, in the order of their placeholders.
        videos: in the order of theirs.
        truth: right answers; of a metric of pairs, the texts or the class of its one image.
        choices: of which the model takes the likeliest; empty: it answers freely.
        category: figures are given for each, too; empty: none.
    """

    name: str
    line: int
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]
    truth: tuple[str, ...]
    videos: tuple[AskedVideo, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of a file.

    Args:
        name: the file's name without its ending.
        path: the file.
        metric: row of ``METRICS``, or of ``PAIR_METRICS``.
        questions: in the file's order.
        classes: names of classes, if the metric has any.
        templates: of the prompts of a class, with ``{}`` for its name.
    """

    name: str
    path: Path
    metric: str
    questions: tuple[Question, ...]
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)

    @property
    def is_of_pairs(self) -> bool:
        """Whether images and texts are compared by their embeddings, and nothing is answered."""
        return self.metric in PAIR_METRICS

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
    lines = _lines(path, flag)
    questions = []
    metrics: dict[str, int] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = _parsed(line)
            metric = _text(fields, "metric") or "exact_match"
            metrics.setdefault(metric, number)
            if metric not in PAIR_METRICS:
                questions.append(_question(fields, number, path.parent))
            elif "image" in fields or not PAIR_METRICS[metric].has_classes:
                questions.append(_image_of_pair(fields, number, path.parent))
            elif classes:
                raise ValueError("has no image, and an earlier line names the classes")
            else:
                classes = _classes(fields)
        except ValueError as error:
            raise ValueError(f"{flag} {path}:{number}: {error}") from None
    if not questions:
        raise ValueError(f"{flag} {path}: has no question")
    if len(metrics) > 1:
        told = ", ".join(f"{metric} in line {line}" for metric, line in metrics.items())
        raise ValueError(f"{flag} {path}: one file has one metric, but here are {told}")
    metric = next(iter(metrics))
    if metric in METRICS and METRICS[metric].needs_choices:
        questions = list(map(_with_listed_choices, questions))
    if metric in PAIR_METRICS and PAIR_METRICS[metric].has_classes:
        classes.setdefault("classes", tuple(dict.fromkeys(one.truth[0] for one in questions)))
    task = Task(name=path.stem, path=path, metric=metric, questions=tuple(questions), **classes)
    for problem in _problems(task):
        raise ValueError(f"{flag} {problem}")
    return task


def _lines(path: Path, flag: str) -> list[str]:
    """Return the lines of a task's file."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error})") from None


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
    if "templates" in fields:
        raise ValueError(f"has templates, which only {_with_classes()} takes")
    images = _images(fields, folder)
    videos = _videos(fields, folder)
    for placeholder, name, media in (
        (IMAGE_PLACEHOLDER, "images", images),
        (VIDEO_PLACEHOLDER, "videos", videos),
    ):
        if len(media) == 1 and placeholder not in text:
            text = f"{placeholder}\n{text}"
        if text.count(placeholder) != len(media):
            raise ValueError(
                f"has {text.count(placeholder)} {placeholder} in its question, but"
                f" {len(media)} {name}"
            )
    turns = [Turn(role="human", text=text)]
    if "system" in fields:
        turns.insert(0, Turn(role="system", text=_text(fields, "system")))
    return Question(
        name=str(fields.get("id", line)),
        line=line,
        turns=tuple(turns),
        images=images,
        videos=videos,
        truth=_truth(fields),
        choices=_texts(fields, "choices"),
        category=_text(fields, "category"),
    )


def _image_of_pair(fields: Mapping[str, Any], line: int, folder: Path) -> Question:
    """Read an image with its texts, or with its class."""
    metric = _text(fields, "metric")
    used = ("question", "system", "choices", "templates", *_VIDEO_KEYS)
    _refuse(fields, used, f"beside {metric} and an image")
    images = _images(fields, folder)
    if len(images) != 1:
        raise ValueError(f"has {len(images)} images, but the metric {metric} needs one")
    truth = _truth(fields)
    if PAIR_METRICS[metric].has_classes and len(truth) > 1:
        raise ValueError(f"has {len(truth)} answers, but an image of {metric} has one class")
    if not all(text.strip() for text in truth):
        raise ValueError("has an empty answer")
    return Question(
        name=str(fields.get("id", line)),
        line=line,
        turns=(),
        images=images,
        truth=truth,
        category=_text(fields, "category"),
    )


def _classes(fields: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Read the line that names classes, and the templates of their prompts."""
    used = ("question", "system", "answer", "answers", "id", "category", *_VIDEO_KEYS)
    _refuse(fields, used, "but no image")
    found = {"classes": _texts(fields, "choices"), "templates": _texts(fields, "templates")}
    if not any(found.values()):
        raise ValueError("has no image, and neither choices (the classes) nor templates")
    for name, texts in found.items():
        if len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
            raise ValueError(f"its {name} are not different texts, each with something in it")
    for template in found["templates"]:
        if template.count("{}") != 1:
            raise ValueError(f"its template {template!r} needs one {{}}, for the name of a class")
    return {name: texts for name, texts in found.items() if texts}


def _refuse(fields: Mapping[str, Any], keys: tuple[str, ...], beside: str) -> None:
    """Refuse keys that a line must not have."""
    found = [key for key in keys if key in fields]
    if found:
        raise ValueError(f"has {', '.join(found)} {beside}; leave that out")


def _with_classes() -> str:
    return ", ".join(name for name, metric in PAIR_METRICS.items() if metric.has_classes)


def _images(fields: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    images = tuple(folder / image for image in _texts(fields, "image"))
    for image in images:
        if not image.is_file():
            raise ValueError(f"its image {image} is missing")
    return images


def _videos(fields: Mapping[str, Any], folder: Path) -> tuple[AskedVideo, ...]:
    """Return the videos of a question."""
    paths = [str(folder / video) for video in _texts(fields, "video")]
    if not paths:
        _refuse(fields, _VIDEO_KEYS[1:], "but no video")
        return ()
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"its video {path} is missing")
    frames = fields.get("frames", USUAL_FRAMES)
    if type(frames) is not int or not 1 <= frames <= MOST_FRAMES:
        raise ValueError(f"frames is {json.dumps(frames)}, not a number from 1 to {MOST_FRAMES}")
    try:
        videos = read_videos(paths, fields, "", {})
    except RejectError as error:
        raise ValueError(error.detail) from None
    return tuple(AskedVideo(video=video, frames=frames) for video in videos)


def _truth(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if "answer" in fields and "answers" in fields:
        raise ValueError("has both answer and answers; keep one of them")
    truth = _texts(fields, "answers" if "answers" in fields else "answer")
    if not truth:
        raise ValueError("has no answer")
    return truth


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
    """Return the question with a line for each choice, unless its text has each behind its letter,
    such as ``(A) red``.
    """
    *others, asked = question.turns
    choices = list(zip(LETTERS, question.choices, strict=False))
    if all(re.search(rf"\b{letter}\b\W*{re.escape(text)}", asked.text) for letter, text in choices):
        return question
    text = "\n".join([asked.text, *(f"{letter}. {choice}" for letter, choice in choices)])
    return replace(question, turns=(*others, replace(asked, text=text)))


def _problems(task: Task) -> Iterator[str]:
    """Report what is wrong with the questions together."""
    if task.metric not in METRICS | PAIR_METRICS:
        names = ", ".join(METRICS | PAIR_METRICS)
        yield f"{task.path}: there is no metric {task.metric}; the metrics are {names}"
        return
    yield from _same_names(task)
    if task.is_of_pairs:
        for question in task.questions:
            if task.classes and question.truth[0] not in task.classes:
                yield f"{task.where(question)}: its answer {question.truth[0]!r} is no class"
        return
    with_choices = [question for question in task.questions if question.choices]
    if 0 < len(with_choices) < len(task.questions):
        yield (
            f"{task.where(with_choices[0])}: has choices, but other questions of the file have"
            " none; split the file"
        )
    for question in task.questions:
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


def _same_names(task: Task) -> Iterator[str]:
    """Report questions of one name."""
    names = Counter(question.name for question in task.questions)
    for question in task.questions:
        if names[question.name] > 1:
            count = names[question.name]
            yield f"{task.where(question)}: {count} questions have the id {question.name}"
