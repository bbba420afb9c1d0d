"""Few-shot prompts: questions with their answers in front of the one that is asked."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavlm.config.evaluation import shots_name
from megavlm.data.records.record import Turn
from megavlm.evaluate.task import Question, Task, read_task


def with_shots(tasks: Sequence[Task], examples: str, shots: Sequence[int]) -> tuple[Task, ...]:
    """Return each task once for every number of examples, under a name of its own unless there are
    none.

    Args:
        tasks: the tasks.
        examples: file with questions in the format of tasks, which examples are taken from.
        shots: numbers of examples; empty: tasks stay as they are.

    Raises:
        ValueError: the file cannot be read, or has too few questions.
    """
    if not shots:
        return tuple(tasks)
    pool = read_task(Path(examples)).questions if max(shots) else ()
    return tuple(
        replace(
            task,
            name=shots_name(task.name, count),
            questions=tuple(
                _behind(question, pool, count, examples) for question in task.questions
            ),
        )
        for task in tasks
        for count in shots
    )


def _behind(question: Question, pool: Sequence[Question], count: int, file: str) -> Question:
    """Put examples in front of a question: others than itself, chosen by its name, so that fewer
    examples are the first ones of more.
    """
    others = [one for one in pool if (one.turns, one.images) != (question.turns, question.images)]
    if len(others) < count:
        raise ValueError(
            f"--eval.examples {file}: has {len(others)} questions that are others than question"
            f" {question.name}, and --eval.shots asks for {count}"
        )
    order = np.random.default_rng(zlib.crc32(question.name.encode())).permutation(len(others))
    chosen = [others[number] for number in order[:count]]
    shown = [
        turn
        for one in chosen
        for turn in (one.turns[-1], Turn(role="gpt", text=one.truth[0], learned=False))
    ]
    *system, asked = question.turns
    images = tuple(image for one in chosen for image in one.images)
    return replace(question, turns=(*system, *shown, asked), images=(*images, *question.images))
