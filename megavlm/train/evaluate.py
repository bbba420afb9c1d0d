"""The loss on validation packs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megavlm.config.checks.experts import spans_data_ranks
from megavlm.config.schema import Vision
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import readable
from megavlm.data.loading.order import Plan
from megavlm.train.bad_steps import StepError
from megavlm.train.job import Job
from megavlm.train.meters import Meter
from megavlm.train.microbatches import Microbatches
from megavlm.train.named_losses import NamedLosses
from megavlm.train.source_losses import SourceLosses
from megavlm.train.step import run_packs
from megavlm.train.whole_step import run_whole_step


@contextlib.contextmanager
def evaluating(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Put this rank's chunks in evaluation mode, inside the context."""
    for chunk in chunks:
        chunk.eval()
    yield
    for chunk in chunks:
        chunk.train()


@torch.no_grad()
def held_out_loss(
    job: Job, *, without_images: bool = False
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Loss over the first ``eval_packs`` validation packs (all for 0), weighed like the training
    loss. Collective; the chunks' parameters are whole.

    Args:
        job: the run.
        without_images: blank all images.

    Returns:
        The loss, the losses that it is made of with the objective's readings, and the mean loss of
            each source's supervised tokens, on ranks of the last chunk; 0 and nothing on others.

    Raises:
        StepError: no token of the packs is supervised; every rank raises it.
    """
    data = job.config.data
    groups = job.groups
    spans_step = job.ddp_chunks[-1].module.objective.spans_step
    plan, count = validation_plan(job)
    if spans_step:
        count = _whole_steps(job, count)
    ids = plan.pack_ids(0, count)
    positions = own_positions(job, count)
    weight = job.valid.weight_sum(ids, data.loss_reduction)
    if not weight:
        raise StepError(
            f"--data.valid {data.valid}: no token of its first {count} packs is supervised, so"
            " there is no loss"
        )
    workers = min(data.workers, len(positions))
    packs = readable(job.batches(job.valid, plan, positions, job.batch_options, workers=workers))
    shown = blanked(packs, job.config.architecture.vision) if without_images else packs
    by_source = SourceLosses(job.valid.source_names, job.backend.device)
    named = NamedLosses(job.config.architecture, job.backend.device)
    meters = (named, by_source)
    with evaluating(job.ddp_chunks), contextlib.closing(packs):
        if spans_step:
            loss = _run_steps(job, shown, ids, weight, meters)
        else:
            loss = run_forward(job, shown, count, weight, meters)
    means = by_source.report(groups)["loss"]
    return float(groups.sum_over_data(loss)), named.report(groups, 1), means


def blanked(packs: Iterator[Batch], vision: Vision) -> Iterator[Batch]:
    """Yield packs with every image in one colour, the mean of the pixels."""
    mean = (torch.tensor(vision.pixel_mean) * 255).round().to(torch.uint8)[:, None, None]
    for pack in packs:
        tiles = mean.to(pack.tiles.device).expand(pack.tiles.shape).contiguous()
        yield dataclasses.replace(pack, tiles=tiles)


def validation_plan(job: Job) -> tuple[Plan, int]:
    """Return the order of the validation packs, and how many of the first ones are measured."""
    # Stored by cost, the first packs would not stand for all.
    plan = Plan(num_packs=len(job.valid), seed=0)
    wanted = job.config.training.eval_packs
    return plan, min(wanted, len(job.valid)) if wanted else len(job.valid)


def own_positions(job: Job, count: int) -> range:
    """Return which of ``count`` packs this data-parallel rank takes. If there are fewer packs than
    ranks, and experts that all ranks share, it takes the first one instead of none: it must run
    some pack.
    """
    groups = job.groups
    own = range(groups.data_rank, count, groups.data_size)
    return own or range(int(spans_data_ranks(job.config.parallel)))


def blank_packs(job: Job, count: int, most: int) -> int:
    """Return how many packs without a loss must follow ``count`` packs: interleaved 1F1B needs a
    multiple of the pipeline's size, and data-parallel ranks with shared experts as many packs each.

    Args:
        job: the run.
        count: packs of this data-parallel rank.
        most: packs of the data-parallel rank that has most.
    """
    total = max(count, most) if spans_data_ranks(job.config.parallel) else count
    total += -total % job.groups.pipeline_size if len(job.ddp_chunks) > 1 else 0
    return total - count


def task_batches(
    job: Job, packs: PackedDataset, numbers: Sequence[int]
) -> Generator[Batch, None, None]:
    """Load packs of a task by their numbers; ``close()`` frees what they hold."""
    plan = Plan(num_packs=len(packs), seed=0, shuffle=False)
    return readable(job.batches(packs, plan, numbers, job.batch_options, workers=0))


def run_forward(
    job: Job, packs: Iterator[Batch], total: int, weight: float, meters: Sequence[Meter]
) -> torch.Tensor:
    """Run packs forward.

    Args:
        job: the run; its chunks are in evaluation mode.
        packs: those of ``own_positions``.
        total: packs of all data-parallel ranks.
        weight: sum of the loss weights of all ranks' packs.
        meters: observe the losses.

    Returns:
        This rank's part of the loss.
    """
    groups = job.groups
    count = len(range(groups.data_rank, total, groups.data_size))
    blank = blank_packs(job, count, -(-total // groups.data_size))
    if not count + blank:
        return torch.zeros((), device=job.backend.device)
    whole = Microbatches(_followed_by_blank(packs, count, blank), count + blank, weight)
    return run_packs(job.ddp_chunks, whole, job.backend, forward_only=True, meters=meters)


def _whole_steps(job: Job, packs: int) -> int:
    """Return how many of the held-out packs make steps as large as those of training, since the
    loss depends on the size of a step; or one smaller step.
    """
    ranks = job.groups.data_size
    batch = job.config.training.global_batch_size
    pool = max(job.config.architecture.image_text.pool_packs, 1)
    part = math.lcm(ranks, pool)  # no pool is cut
    return packs // batch * batch or packs // part * part or packs // ranks * ranks


def _run_steps(
    job: Job, packs: Iterator[Batch], ids: np.ndarray, weight: float, meters: Sequence[Meter]
) -> torch.Tensor:
    """Return this rank's part of the loss over packs in steps as large as those of training."""
    batch = min(job.config.training.global_batch_size, len(ids))
    loss = torch.zeros((), device=job.backend.device)
    for start in range(0, len(ids), batch):
        samples = job.samples_of_ranks(job.valid.records(ids[start : start + batch]))
        step = Microbatches(packs, batch // job.groups.data_size, weight, samples=samples)
        loss += run_whole_step(job.ddp_chunks, step, job.backend, forward_only=True, meters=meters)
    return loss


def _followed_by_blank(packs: Iterator[Batch], count: int, blank: int) -> Iterator[Batch]:
    """Yield ``count`` packs, then the last one that there is ``blank`` times without a loss."""
    for number, pack in enumerate(packs):
        if number < count:
            yield pack
    for _ in range(blank):
        yield dataclasses.replace(pack, loss_weights=torch.zeros_like(pack.loss_weights))
