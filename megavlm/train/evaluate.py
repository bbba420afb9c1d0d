"""The loss on validation packs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from megavlm.data.loading.batch import Batch
from megavlm.data.loading.order import Plan
from megavlm.train.job import Job
from megavlm.train.source_losses import SourceLosses
from megavlm.train.step import run_packs


@torch.no_grad()
def held_out_loss(job: Job) -> tuple[float, dict[str, float]]:
    """Loss over the first ``eval_packs`` validation packs (all for 0), weighed like the training
    loss. Collective.

    Returns:
        The loss, and the mean loss of each source's supervised tokens, on ranks of the last chunk;
            0 and nothing on others.
    """
    data = job.config.data
    groups = job.groups
    wanted = job.config.training.eval_packs
    # Stored by cost, the first packs would not stand for all.
    plan = Plan(num_packs=len(job.valid), seed=0)
    count = min(wanted, len(job.valid)) if wanted else len(job.valid)
    positions = range(groups.data_rank, count, groups.data_size)
    weight = job.valid.weight_sum(plan.pack_ids(0, count), data.loss_reduction)
    if not weight:
        raise ValueError(
            f"--data.valid {data.valid}: no token of its first {count} packs is supervised, so"
            " there is no loss"
        )
    workers = min(data.workers, len(positions))
    packs = job.batches(job.valid, plan, positions, workers=workers)
    loss = torch.zeros((), device=job.backend.device)
    by_source = SourceLosses(job.valid.source_names, job.backend.device)
    for chunk in job.ddp_chunks:
        chunk.eval()
    with contextlib.closing(packs):
        if len(positions):
            blank = -len(positions) % groups.pipeline_size if len(job.ddp_chunks) > 1 else 0
            filled = _followed_by_blank(packs, blank)
            loss = run_packs(
                job.ddp_chunks,
                filled,
                len(positions) + blank,
                weight,
                job.backend,
                forward_only=True,
                meters=(by_source,),
            )
    for chunk in job.ddp_chunks:
        chunk.train()
    means = by_source.report(groups)["loss"]
    return float(groups.sum_over_data(loss)), means


def _followed_by_blank(packs: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Yield the packs, then the last one again ``count`` times without a loss: interleaved 1F1B
    needs a multiple of the pipeline's size.
    """
    for pack in packs:
        yield pack
    for _ in range(count):
        yield dataclasses.replace(pack, loss_weights=torch.zeros_like(pack.loss_weights))
