"""The loss on held-out packs."""

from __future__ import annotations

import contextlib

import torch

from megavlm.data.loader import batches
from megavlm.data.plan import Plan
from megavlm.model.precision import tile_multiple
from megavlm.train.job import Job
from megavlm.train.step import run_packs


@torch.no_grad()
def held_out_loss(job: Job) -> float:
    """Loss over the first ``eval_packs`` held-out packs (all for 0), weighed like the training loss. Collective.

    Returns:
        The loss, on ranks of the last chunk; 0 on others.
    """
    data, groups, wanted = job.config.data, job.groups, job.config.training.eval_packs
    # Stored by cost, the first packs would not stand for all.
    plan = Plan(num_packs=len(job.valid), seed=0)
    count = min(wanted, len(job.valid)) if wanted else len(job.valid)
    positions = range(groups.data_rank, count, groups.data_size)
    weight = job.valid.weight_sum(plan.pack_ids(0, count), data.loss_reduction)
    if not weight:
        raise ValueError(f"--data.valid {data.valid}: no token of its first {count} packs is supervised, so there is no loss")
    packs = batches(
        job.valid,
        plan,
        positions,
        reduction=data.loss_reduction,
        vision_layers=job.config.architecture.vision.num_layers,
        workers=min(data.workers, len(positions)),
        prefetch=data.prefetch,
        timeout=data.timeout,
        with_tiles=job.model.pre_process,
        share=groups.share,
        tile_multiple=tile_multiple(job.config),
    )
    loss = torch.zeros((), device=job.backend.device)
    job.wrapped.eval()
    with contextlib.closing(packs):
        if len(positions):
            loss = run_packs(job.wrapped, packs, len(positions), weight, job.backend, forward_only=True)
    job.wrapped.train()
    return float(groups.sum_over_data(loss))
