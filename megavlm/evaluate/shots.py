"""Few-shot prompts: questions with their answers in front of the one that is asked."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavlm.config.evaluation import shots_name
from megavlm.data.records.record import Turn
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.short_answers import LETTERS
from megavlm.evaluate.task import Question, Task, read_task


def with_shots(tasks: Sequence[Task], examples: str, shots: Sequence[int]) -> tuple[Task, ...]:
    """Return each task once for every number of examples, under a name of its own unless there are
    none.

    Args:
        tasks: the tasks.
        examples: file with questions in the format of tasks, and of their metric, which examples
            are taken from.
        shots: numbers of examples; empty: tasks stay as they are.

    Raises:
        ValueError: the file cannot be read, has too few questions or another metric, or two tasks
            would have one name.
    """
    if not shots:
        return tuple(tasks)
    pool = read_task(Path(examples), "--eval.examples") if max(shots) else None
    found = tuple(_asked(task, pool, count) for task in tasks for count in shots)
    names = Counter(task.name for task in found)
    for task in found:
        if names[task.name] > 1:
            raise ValueError(
                f"--eval.tasks, --eval.shots: {names[task.name]} tasks would be called {task.name};"
                " figures go by these names, so rename a file"
            )
    return found


def _asked(task: Task, pool: Task | None, count: int) -> Task:
    """Return a task whose questions stand behind so many examples of a pool."""
    if not count or pool is None:
        return task
    if pool.metric != task.metric:
        raise ValueError(
            f"--eval.examples {pool.path}: its metric is {pool.metric}, but that of --eval.tasks"
            f' {task.path} is {task.metric}; write "metric": "{task.metric}" into each line of the'
            " examples, and answers as it takes them"
        )
    questions = tuple(_behind(question, pool, count) for question in task.questions)
    return replace(task, name=shots_name(task.name, count), questions=questions)


def _behind(question: Question, pool: Task, count: int) -> Question:
    """Put examples in front of a question: others than itself, chosen by its name, so that fewer
    examples are the first ones of more.
    """
    others = [
        one
        for one in pool.questions
        if (one.turns, one.images, one.videos) != (question.turns, question.images, question.videos)
    ]
    if len(others) < count:
        raise ValueError(
            f"--eval.examples {pool.path}: has {len(others)} questions that are others than"
            f" question {question.name}, and --eval.shots asks for {count}"
        )
    order = np.random.default_rng(zlib.crc32(question.name.encode())).permutation(len(others))
    chosen = [others[number] for number in order[:count]]
    shown = [
        turn
        for one in chosen
        for turn in (one.turns[-1], Turn(role="gpt", text=_right(one, pool.metric), learned=False))
    ]
    *system, asked = question.turns
    images = tuple(image for one in (*chosen, question) for image in one.images)
    videos = tuple(video for one in (*chosen, question) for video in one.videos)
    return replace(question, turns=(*system, *shown, asked), images=images, videos=videos)


def _right(question: Question, metric: str) -> str:
    """Return the right answer as a model is to give it: of choices with letters, the letter."""
    truth = question.truth[0]
    if not question.choices:
        return truth
    choices = question.choices
    index = choices.index(truth) if truth in choices else LETTERS.index(truth)
    return METRICS[metric].choice(index, choices[index])
