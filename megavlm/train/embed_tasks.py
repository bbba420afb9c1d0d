"""Embeddings of the images and texts of a task, shared among the data-parallel ranks."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.evaluate.pair_packs import PairPacks
from megavlm.train.evaluate import task_batches
from megavlm.train.job import Job
from megavlm.train.whole_step import outputs_of


@torch.no_grad()
def embed(job: Job, task: PairPacks) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the images and of the texts of a task, of length one, on the host of
    every rank. Each data-parallel rank computes those of its packs. Collective; the chunks'
    parameters are whole.

    Args:
        job: the run; its chunks are in evaluation mode.
        task: of a metric of pairs.

    Returns:
        float32 [I, E] and [T, E]; minus infinite if they are not numbers.
    """
    groups = job.groups
    numbers = range(groups.data_rank, len(task.order), groups.data_size)
    size = job.config.architecture.contrastive.size
    shape = (2, len(task.requests), size)
    found = torch.full(shape, -torch.inf, device=job.backend.device)
    if len(numbers):
        with contextlib.closing(task_batches(job, task.packs, numbers)) as batches:
            outputs = outputs_of(job.ddp_chunks, batches, len(numbers), job.backend)
        # Ranks without the last chunk have none.
        for number, output in zip(numbers, outputs, strict=False):
            is_finite = output.isfinite().all(dim=-1, keepdim=True)
            found[:, list(task.order[number])] = output.masked_fill(~is_finite, -torch.inf)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    images, texts = found.cpu()
    return images[: len(task.truth)], texts[: len(task.texts)]
