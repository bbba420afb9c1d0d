"""Retrieval among the validation pairs: each image finds its text among all, and the reverse.

Shape letters: n pairs of this data-parallel rank, N of all, E size of the embeddings.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from megavlm.data.loading.order import Plan
from megavlm.evaluate.pair_metrics import CUTS, RECALLS, search_ranks
from megavlm.parallel.gather_rows import gather_rows
from megavlm.train.evaluate import evaluating, validation_plan
from megavlm.train.job import Job
from megavlm.train.whole_step import outputs_of


@torch.no_grad()
def recalls(job: Job) -> dict[str, float]:
    """Measure retrieval among the first ``eval_packs`` validation packs (all for 0). Collective;
    the chunks' parameters are whole.

    If others are as similar as the right one, such as the same words for another image, half of
    them count as better. So one more such text does no harm, and embeddings that are all alike find
    nothing.

    Returns:
        Figures by name: the share of images, or texts, whose own is among so many of the most
            similar; on ranks with the last chunk, nothing on others.
    """
    plan, count = validation_plan(job)
    with evaluating(job.ddp_chunks):
        outputs = _embed(job, plan, count)
    if not job.groups.has_last_chunk:
        return {}
    records = job.valid.index[plan.pack_ids(0, count)]
    counts = list(map(sum, job.samples_of_ranks(records)))
    size = job.config.architecture.contrastive.size
    none = torch.zeros(2, 0, size, device=job.backend.device)  # a rank may have no pack
    images, texts = torch.cat([none, *outputs], dim=1)
    group = job.groups.collection.dp_cp
    first = sum(counts[: job.groups.data_rank])
    hits = torch.cat(
        [
            _hits(images, gather_rows(texts, counts, group), first),
            _hits(texts, gather_rows(images, counts, group), first),
        ]
    )
    shares = job.groups.sum_over_data(hits) / sum(counts)
    return {f"recall/{name}": share for name, share in zip(RECALLS, shares.tolist(), strict=True)}


def _embed(job: Job, plan: Plan, count: int) -> list[Tensor]:
    """Return the embeddings of this rank's packs, float32 [2, pairs, E] each, in their order."""
    positions = range(job.groups.data_rank, count, job.groups.data_size)
    if not len(positions):
        return []
    workers = min(job.config.data.workers, len(positions))
    batches = job.batches(job.valid, plan, positions, workers=workers)
    with contextlib.closing(batches):
        return outputs_of(job.ddp_chunks, batches, len(positions), job.backend)


def _hits(queries: Tensor, found: Tensor, first: int) -> Tensor:
    """Count the queries whose own is among the most similar, for each of ``CUTS``, float64.

    Args:
        queries: of this rank [n, E].
        found: what they find, of all ranks [N, E].
        first: index among ``found`` of the first query's own.
    """
    labels = torch.arange(len(found), device=found.device)
    places = search_ranks(queries, found, labels[first : first + len(queries)], labels)
    return torch.stack([(places < cut).sum() for cut in CUTS]).double()
