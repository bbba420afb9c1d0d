"""Tasks that the model answers at each evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.evaluation import VALID_LOSS
from megavlm.config.schema import Config, Eval
from megavlm.data.store.manifest import first_with_images
from megavlm.evaluate.graded import (
    ANSWERS,
    Graded,
    chosen,
    grade,
    grade_pairs,
    write_rows,
    written,
)
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.packs import TaskPacks, prepare
from megavlm.evaluate.pair_metrics import PAIR_METRICS
from megavlm.evaluate.pair_packs import PairPacks, prepare_pairs
from megavlm.evaluate.shots import with_shots
from megavlm.evaluate.task import Task, read_tasks
from megavlm.io.remote import is_remote
from megavlm.train.embed_tasks import embed
from megavlm.train.evaluate import evaluating
from megavlm.train.generate import choose, generate
from megavlm.train.job import Job


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a task was answered.

    Args:
        figures: by name, ``TASK/FIGURE``, on every rank.
        by_category: the first figure of each category, by the same name, on the writing rank; empty
            without categories.
        problems: what could not be written, for people; a full disk does not end a run.
        answers: of each task, what its file of answers holds of each question; on the writing rank.
    """

    figures: dict[str, float]
    by_category: dict[str, dict[str, float]]
    problems: list[str]
    answers: dict[str, list[dict[str, Any]]]


def open_tasks(config: Config) -> tuple[TaskPacks | PairPacks, ...]:
    """Read the tasks of a run.

    Raises:
        ValueError: a task that cannot be asked, with its file and line.
    """
    needs = config.architecture.needs
    longest = needs.longest_sample(config.architecture)
    folders = config.data.train_folders
    return _open(
        config.eval,
        first_with_images(folders) if config.eval.tasks else folders[0],
        config.checkpoint.best_by,
        config.architecture.objective,
        longest[1] if longest else 0,
    )


def task_facts(config: Config) -> dict[str, str]:
    """Return what must be the same on every rank: what each task asks, and in which packs."""
    facts = {}
    for task in open_tasks(config):
        digest = hashlib.sha256(repr(task.order).encode())
        for one in task.requests:
            digest.update(one.tokens.tobytes())
            digest.update(repr([(image.columns, image.rows) for image in one.images]).encode())
        facts[f"questions and images of --eval.tasks {task.task.path}, {task.task.name}"] = (
            digest.hexdigest()[:16]
        )
    return facts


# Each stage of a command opens its tasks to be checked, and to run.
@lru_cache(maxsize=8)
def _open(
    evaluation: Eval, folder: str, best_by: str, objective: str, longest: int
) -> tuple[TaskPacks | PairPacks, ...]:
    given = read_tasks(evaluation.tasks)
    for task in given:  # first, since images with texts can have no examples in front
        if task.is_of_pairs != (objective == "contrastive"):
            names = ", ".join(PAIR_METRICS if objective == "contrastive" else METRICS)
            raise ValueError(
                f"--eval.tasks {task.path}: the metric {task.metric} is not for a model of the"
                f" objective {objective}, whose metrics are {names}"
            )
    tasks = with_shots(given, evaluation.examples, evaluation.shots)
    if tasks and (is_remote(folder) or not (Path(folder) / "tokenizer").is_dir()):
        raise ValueError(
            f"--eval.tasks needs the tokenizer of the packs, and --data.train {folder} has no"
            " folder tokenizer on this machine; name local packs"
        )
    names = figure_names(tasks)
    if best_by != VALID_LOSS and best_by not in names:
        raise ValueError(
            f"--checkpoint.best_by {best_by}: the figures of --eval.tasks are {', '.join(names)}"
        )
    return tuple(
        prepare_pairs(task, folder, longest)
        if task.is_of_pairs
        else prepare(task, folder, evaluation.max_new_tokens, longest)
        for task in tasks
    )


def answer_tasks(job: Job, step: int, progress: Callable[[], None]) -> Result:
    """Answer all tasks of the run, measure the answers, and write them to the save folder.
    Collective; the chunks' parameters are whole.

    Args:
        job: the run.
        step: updates that are done, which the answers are filed under.
        progress: called from time to time.
    """
    figures: dict[str, float] = {}
    by_category: dict[str, dict[str, float]] = {}
    problems: list[str] = []
    answers: dict[str, list[dict[str, Any]]] = {}
    for task in job.tasks:
        with evaluating(job.ddp_chunks):
            graded = (_embedded if task.task.is_of_pairs else _answered)(job, task, progress)
        if graded is None:
            continue
        name = task.task.name
        figures |= graded.figures
        by_category |= graded.by_category
        answers[name] = graded.rows
        if job.config.checkpoint.save:
            folder = Path(job.config.checkpoint.save) / ANSWERS / f"step-{step:08d}"
            try:
                write_rows(folder / f"{name}.jsonl", graded.rows)
            except (OSError, UnicodeEncodeError) as error:
                problems.append(f"ERROR: {folder / name}.jsonl: not written ({error})")
    return Result(
        figures=_on_every_rank(job, figures),
        by_category=by_category,
        problems=problems,
        answers=answers,
    )


def figure_names(tasks: Sequence[Task]) -> list[str]:
    """Return the names of the figures of tasks."""
    rows = METRICS | PAIR_METRICS
    return [f"{task.name}/{figure}" for task in tasks for figure in rows[task.metric].figures]


def _on_every_rank(job: Job, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the writing rank's figures on every rank. Collective."""
    names = figure_names([task.task for task in job.tasks])
    values = [figures[name] if job.groups.is_writer else 0.0 for name in names]
    shared = torch.tensor(values, dtype=torch.float64, device=job.backend.device)
    dist.all_reduce(shared)
    return dict(zip(names, shared.tolist(), strict=True))


def _answered(job: Job, task: TaskPacks, progress: Callable[[], None]) -> Graded | None:
    """Let the model answer a task; returns what the writing rank makes of it. Collective; choices
    are right on ranks with the last chunk.
    """
    if task.task.questions[0].choices:
        given = chosen(task.task, choose(job, task))
    else:
        given = written(task, generate(job, task, job.config.eval.max_new_tokens, progress))
    return grade(task.task, given) if job.groups.is_writer else None


def _embedded(job: Job, task: PairPacks, progress: Callable[[], None]) -> Graded | None:
    """Let the model embed the images and texts of a task; returns what the writing rank makes of
    them. Collective.
    """
    progress()
    images, texts = embed(job, task)
    if not job.groups.is_writer:
        return None
    score, nearest = task.judge(images, texts)
    return grade_pairs(task.task, score, nearest)
