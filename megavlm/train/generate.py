"""Answers of the model that is trained, on any layout.

Each pass runs whole packs of questions through the pipeline, as training does, and adds one token
to each answer. That is exact and needs no other code for attention; a cache would save time for
long answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.data.loading.dataset import sample_positions
from megavlm.data.loading.order import Plan
from megavlm.evaluate.packs import TaskPacks
from megavlm.model.greedy import likeliest_tokens
from megavlm.train.evaluate import blank_packs, own_positions, run_forward
from megavlm.train.job import Job
from megavlm.train.pipeline import run_pipeline
from megavlm.train.source_losses import SourceLosses

# Packs of a data-parallel rank whose tiles are held at once.
_WINDOW = 16


@dataclass(frozen=True, kw_only=True)
class _OpenPack:
    """A pack of questions whose answers grow.

    Args:
        batch: this rank's slice, with no answer yet.
        questions: indices of its questions.
        ends: position in the pack where each prompt ends.
        local: index among this rank's tokens of each position in the pack; -1: another rank's.
    """

    batch: Batch
    questions: tuple[int, ...]
    ends: tuple[int, ...]
    local: np.ndarray

    def with_answers(
        self, answers: Sequence[Sequence[int]], is_done: Sequence[bool]
    ) -> tuple[Batch, list[int]]:
        """Return the batch with the answers so far, which asks for the next token of those that
        are not done; and the questions whose next token this rank computes, in order.
        """
        tokens = self.batch.tokens.clone()
        asked = []
        for question, end in zip(self.questions, self.ends, strict=True):
            for position, token in enumerate(answers[question], end):
                if self.local[position] >= 0:
                    tokens[self.local[position]] = token
            last = int(self.local[end + len(answers[question]) - 1])
            if not is_done[question] and last >= 0:
                asked.append((last, question))
        asked.sort()
        positions = torch.tensor([last for last, _ in asked] or [0])
        batch = dataclasses.replace(self.batch, tokens=tokens, loss_positions=positions)
        return batch, [question for _, question in asked]


@torch.no_grad()
def generate(
    job: Job, task: TaskPacks, max_new_tokens: int, progress: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Return the tokens of the greedy answer to each question, with the one that ends it.
    Collective.

    Args:
        job: the run; its chunks are in evaluation mode.
        task: questions without choices.
        max_new_tokens: longest answer.
        progress: called before each pass.
    """
    answers: list[list[int]] = [[] for _ in task.asked]
    is_done = [False for _ in task.asked]
    window = job.groups.data_size * _WINDOW
    for start in range(0, len(task.order), window):
        numbers = range(start, min(start + window, len(task.order)))
        opened = _open(job, task, [numbers[own] for own in own_positions(job, len(numbers))])
        questions = [question for number in numbers for question in task.order[number]]
        for _ in range(max_new_tokens):
            progress()
            most = _most_packs(job, [task.order[number] for number in numbers], is_done)
            tokens = _next_tokens(job, opened, answers, is_done, most)
            for question in questions:
                if not is_done[question]:
                    answers[question].append(tokens[question])
                    is_done[question] = task.is_over(answers[question])
            if all(is_done[question] for question in questions):
                break
    return answers


def _open(job: Job, task: TaskPacks, numbers: Sequence[int]) -> list[_OpenPack]:
    """Load packs of questions."""
    plan = Plan(num_packs=len(task.packs), seed=0, shuffle=False)
    batches = job.batches(task.packs, plan, numbers, workers=0)
    manifest = task.packs.manifest
    opened = []
    with contextlib.closing(batches):
        for number, batch in zip(numbers, batches, strict=True):
            asked = [task.asked[index] for index in task.order[number]]
            lengths = np.array([len(one.tokens) + one.room for one in asked])
            _, ends = sample_positions(lengths, manifest.alignment, manifest.capacity)
            own = job.groups.rank_slice.tokens(ends)
            local = np.full(manifest.capacity, -1)
            local[own] = np.arange(len(own))
            starts = ends[: len(asked)].tolist()
            opened.append(
                _OpenPack(
                    batch=batch,
                    questions=task.order[number],
                    ends=tuple(
                        start + len(one.tokens) for start, one in zip(starts, asked, strict=True)
                    ),
                    local=local,
                )
            )
    return opened


def _most_packs(job: Job, questions: Sequence[Sequence[int]], is_done: Sequence[bool]) -> int:
    """Count the packs with an answer that is not done, of the data-parallel rank that has most.

    Args:
        job: the run.
        questions: of each pack of all ranks.
        is_done: of each question.
    """
    is_open = [not all(is_done[question] for question in pack) for pack in questions]
    ranks = range(job.groups.data_size)
    return max(sum(is_open[rank :: job.groups.data_size]) for rank in ranks)


def _next_tokens(
    job: Job,
    opened: Sequence[_OpenPack],
    answers: Sequence[Sequence[int]],
    is_done: Sequence[bool],
    most: int,
) -> list[int]:
    """Return the next token of each answer that is not done, on every rank; -1 for those of other
    packs. Collective.

    Args:
        job: the run.
        opened: packs of this rank.
        answers: so far, of each question.
        is_done: of each question.
        most: packs with an answer that is not done, of the rank that has most.
    """
    found = torch.full((len(answers),), -1, dtype=torch.int64, device=job.backend.device)
    grown = [
        pack.with_answers(answers, is_done)
        for pack in opened
        if not all(is_done[question] for question in pack.questions)
    ]
    blank = blank_packs(job, len(grown), most)
    if grown or blank:
        last = grown[-1][0] if grown else opened[-1].with_answers(answers, is_done)[0]
        grown += [(last, []) for _ in range(blank)]
        run_pipeline(
            job.ddp_chunks,
            (batch for batch, _ in grown),
            len(grown),
            _keep(job, [questions for _, questions in grown], found),
            job.backend,
            forward_only=True,
            with_loss=False,
        )
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def _keep(
    job: Job, questions: Sequence[Sequence[int]], found: Tensor
) -> Callable[[Batch, Tensor], Tensor]:
    """Make what the last chunk calls with the logits of each pack, in their order."""
    waiting: Iterator[Sequence[int]] = iter(questions)
    last = job.chunks[-1]

    def keep(batch: Batch, logits: Tensor) -> Tensor:
        tokens = likeliest_tokens(logits, last.language.real_rows, job.groups.collection.tp)
        own = next(waiting)
        if own:
            found[torch.tensor(own, device=found.device)] = tokens[: len(own)]
        return logits.new_zeros(())

    return keep


@torch.no_grad()
def choose(job: Job, task: TaskPacks) -> list[int]:
    """Return the likeliest choice of each question, by the sum of its tokens' log-probabilities;
    known to ranks with the last chunk. Collective.

    Args:
        job: the run; its chunks are in evaluation mode.
        task: questions with choices.
    """
    losses = SourceLosses([str(index) for index in range(len(task.asked))], job.backend.device)
    plan = Plan(num_packs=len(task.packs), seed=0, shuffle=False)
    ids = np.arange(len(task.packs))
    batches = job.batches(task.packs, plan, own_positions(job, len(ids)), workers=0)
    with contextlib.closing(batches):
        run_forward(job, batches, len(ids), 1.0, (losses,))
    means = losses.report(job.groups)["loss"]
    best: dict[int, tuple[float, int]] = {}
    first: dict[int, int] = {}
    for index, (one, owner) in enumerate(zip(task.asked, task.owners, strict=True)):
        first.setdefault(owner, index)
        # SourceLosses has nothing on ranks without the last chunk, and of what is not finite.
        loss = means.get(str(index), math.inf) * int(one.supervised[1:].sum())
        if owner not in best or loss < best[owner][0]:
            best[owner] = (loss, index - first[owner])
    return [best[owner][1] for owner in sorted(best)]
