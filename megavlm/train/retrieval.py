"""Retrieval among the validation pairs: each image finds any of its texts among all, and each text
its image. Pairs of equal images are several texts of one image, as in COCO.

Shape letters: n pairs of this data-parallel rank, N of all, E size of the embeddings.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.data.loading.loader import readable
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
        Figures by name: the share of images that have a text, or of texts that have their image,
            among so many of the most similar; on ranks with the last chunk, nothing on others.
    """
    plan, count = validation_plan(job)
    with evaluating(job.ddp_chunks):
        outputs, ids = _embed(job, plan, count)
    if not job.groups.has_last_chunk:
        return {}
    records = job.valid.records(plan.pack_ids(0, count))
    counts = list(map(sum, job.samples_of_ranks(records)))
    size = job.config.architecture.contrastive.size
    none = torch.zeros(2, 0, size, device=job.backend.device)  # a rank may have no pack
    images, texts = torch.cat([none, *outputs], dim=1)
    own = torch.cat([none.new_empty(0, dtype=torch.int64), *ids])
    group = job.groups.collection.dp_cp
    owners = gather_rows(own, counts, group)
    is_first = _is_first(owners)
    first = sum(counts[: job.groups.data_rank])
    asks = is_first[first : first + len(own)]
    all_images = gather_rows(images, counts, group)[is_first]
    of_images = search_ranks(images[asks], gather_rows(texts, counts, group), own[asks], owners)
    of_texts = search_ranks(texts, all_images, own, owners[is_first])
    hits = job.groups.sum_over_data(torch.cat([_hits(of_images), _hits(of_texts)]))
    asked = hits.new_tensor([len(all_images)] * len(CUTS) + [len(owners)] * len(CUTS))
    shares = (hits / asked).tolist()
    return {f"recall/{name}": share for name, share in zip(RECALLS, shares, strict=True)}


def _embed(job: Job, plan: Plan, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the embeddings of this rank's packs, float32 [2, pairs, E] each, in their order; and
    the ids of the images of each, int64 [pairs], which are equal for equal images; both on ranks
    with the last chunk.
    """
    positions = range(job.groups.data_rank, count, job.groups.data_size)
    if not len(positions):
        return [], []
    workers = min(job.config.data.workers, len(positions))
    is_last = job.groups.has_last_chunk
    options = job.batch_options
    if is_last:
        options = dataclasses.replace(options, with_pair_ids=True)
    batches = readable(job.batches(job.valid, plan, positions, options, workers=workers))
    ids: list[Tensor] = []

    def noting() -> Iterator[Batch]:
        for batch in batches:
            if is_last:
                ids.append(batch.pair_ids[:, 0].to(job.backend.device))
            yield batch

    with contextlib.closing(batches):
        outputs = outputs_of(job.ddp_chunks, noting(), len(positions), job.backend)
    return outputs, ids


def _is_first(ids: Tensor) -> Tensor:
    """Return which of some ids [N] have none like them before them, bool [N]."""
    _, number = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(places, len(ids)).scatter_reduce(0, number, places, "amin")
    return first[number] == places


def _hits(places: Tensor) -> Tensor:
    """Count the searches that find what is right, for each of ``CUTS``, float64."""
    return torch.stack([(places < cut).sum() for cut in CUTS]).double()
