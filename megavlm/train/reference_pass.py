"""The probabilities that a frozen model gives the answers of preferences: computed once, before the
first step, by the weights that a run starts from. So training needs no second model.

A pass that was stopped goes on where it was, at any layout: what is written is whole packs, in the
order of their ids.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavlm.checkpoint import lock
from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.config.schema import Config
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import readable
from megavlm.data.loading.order import Plan
from megavlm.data.store.manifest import read_manifest
from megavlm.data.store.reference import (
    Reference,
    ReferenceFacts,
    ReferenceWriter,
    reference_folder,
)
from megavlm.io.progress import Progress
from megavlm.parallel.gather_rows import gather_rows
from megavlm.train.evaluate import evaluating
from megavlm.train.job import Job
from megavlm.train.metrics import Metrics
from megavlm.train.pipeline import run_pipeline
from megavlm.train.reference import (
    ReferenceError,
    facts_of,
    find,
    folders_of,
    of_another,
    weights_of,
)
from megavlm.train.resume import Start
from megavlm.train.stop_signal import StopRequest

# Packs of a rank between two writes.
_PACKS_OF_BLOCK = 16
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5


def prepare(job: Job, start: Start, metrics: Metrics, stop: StopRequest) -> bool:
    """Compute what ``--data.reference`` lacks of the run's datasets. Collective.

    Args:
        job: the run; its chunks' parameters are whole, and as the run starts.
        start: what it starts from.
        metrics: get a line for each dataset.
        stop: what people ask of the command.

    Returns:
        whether everything is there; otherwise the run was asked to stop.

    Raises:
        RankError: what is there is damaged, or of other weights than those that the run starts
            from; or a run that is resumed lacks it.
    """
    config = job.config
    if not config.reference:
        return True
    if start is None:
        metrics.log(
            "WARNING: the reference model, with which answers are compared, has random weights;"
            " name the model to start from with --checkpoint.load"
        )
    weights = weights_of(config, start)
    for folder in folders_of(config):
        facts = facts_of(weights, folder)
        place = reference_folder(config.reference, folder, read_manifest(folder))
        if not _prepare_dataset(job, start, place, facts, metrics, stop):
            metrics.log(
                f"stopped by {stop.cause} before the first step; the same command goes on with the"
                f" reference's probabilities in {place}"
            )
            stop.is_agreed = True
            return False
        with raised_on_all():
            _wait_for(place)
    return True


def _prepare_dataset(
    job: Job,
    start: Start,
    place: Path,
    facts: ReferenceFacts,
    metrics: Metrics,
    stop: StopRequest,
) -> bool:
    """Compute what is missing of a dataset, and return whether all is there; arguments and errors
    as for ``prepare`` and ``find``. Collective.
    """
    found: list[ReferenceFacts | None] = []
    with contextlib.ExitStack() as stack:
        with raised_on_all():
            if job.groups.is_writer:
                found.append(_find_or_lock(stack, job.config, start, place, facts))
        for one in filter(None, found):
            metrics.log(f"reference: probabilities of {facts.dataset} by {one.weights}, in {place}")
            if problem := of_another(job.config, start, one):
                metrics.log(problem)
        if not job.groups.any_rank(found == [None], job.backend.device):
            return True
        return _compute(job, place, facts, metrics, stop)


def _find_or_lock(
    stack: contextlib.ExitStack, config: Config, start: Start, place: Path, facts: ReferenceFacts
) -> ReferenceFacts | None:
    """Return what the probabilities of a dataset are of; none if they have to be computed, and the
    stack then holds the lock of their folder. Other arguments and errors as for ``find``.

    Raises:
        ReferenceError: another run computes them.
    """
    found = find(config, start, place, facts)
    if found is not None:
        return found
    try:
        stack.enter_context(lock.held(place, flag="--data.reference"))
    except lock.LockedError as error:
        raise ReferenceError(
            f"{error}; or wait until it has computed the probabilities, and start this run again"
        ) from None
    return find(config, start, place, facts)  # another run may have completed them meanwhile


def _wait_for(place: Path, patience: float = _PATIENCE_SECONDS) -> None:
    """Wait until this machine sees complete probabilities, which a network file system may show
    some seconds later.

    Raises:
        ReferenceError: it does not.
    """
    deadline = time.monotonic() + patience
    while not Reference(place).is_complete:
        if time.monotonic() > deadline:
            raise ReferenceError(
                f"{place}: {socket.gethostname()} does not see the reference's probabilities that"
                " another machine has; name a folder that all share with --data.reference"
            )
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """The packs of a dataset in blocks, of each of which every data-parallel rank runs as many.

    Args:
        packs: of the dataset.
        first: the first one that is to be run.
        ranks: data-parallel ranks.
        multiple: of the packs that a rank runs.
    """

    packs: int
    first: int
    ranks: int
    multiple: int

    def __iter__(self) -> Iterator[range]:
        """Yield the packs of each block."""
        left = -(-(self.packs - self.first) // self.ranks)
        slots = min(_PACKS_OF_BLOCK, max(left, 1))
        size = -(-slots // self.multiple) * self.multiple * self.ranks
        for first in range(self.first, self.packs, size):
            yield range(first, first + size)

    def of_rank(self, block: range, rank: int) -> list[int]:
        """Return the packs that a rank runs of a block; the dataset's last one stands for those
        beyond it.
        """
        return [min(pack, self.packs - 1) for pack in block[rank :: self.ranks]]


def _compute(
    job: Job, place: Path, facts: ReferenceFacts, metrics: Metrics, stop: StopRequest
) -> bool:
    """Compute what is missing of a dataset; return whether all is there. Collective."""
    groups = job.groups
    device = job.backend.device
    dataset = PackedDataset(facts.dataset, with_shards=False)
    writers: list[ReferenceWriter] = []
    with raised_on_all():
        if groups.is_writer:
            writers.append(ReferenceWriter(place, facts, dataset.index))
    first = int(groups.from_writer(writers[0].packs if writers else 0, device))
    behind = f", from pack {first:,} on" if first else ""
    metrics.log(
        f"reference: computing the probabilities of the answers of {facts.dataset},"
        f" {len(dataset):,} packs{behind}, by {facts.weights}"
    )
    several = len(job.ddp_chunks) > 1
    blocks = _Blocks(
        packs=len(dataset),
        first=first,
        ranks=groups.data_size,
        multiple=groups.pipeline_size if several else 1,
    )
    own = [pack for block in blocks for pack in blocks.of_rank(block, groups.data_rank)]
    plan = Plan(num_packs=len(dataset), seed=0, shuffle=False)
    workers = min(job.config.data.workers, len(own))
    packs = readable(job.batches(dataset, plan, own, job.batch_options, workers=workers))
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        stack.enter_context(contextlib.closing(packs))
        stack.enter_context(evaluating(job.ddp_chunks))
        progress = None
        if writers:
            progress = stack.enter_context(Progress("reference", "packs", len(dataset), first))
        for block in blocks:
            logprobs = _of_block(job, dataset, blocks, block, packs)
            with raised_on_all():
                if writers:
                    _refuse_strange(dataset, block, logprobs)
                    writers[0].append(logprobs)
                    progress.add(min(block.stop, len(dataset)) - block.start)
            if groups.any_rank(stop.asked, device) and block.stop < len(dataset):
                return False
        with raised_on_all():
            for writer in writers:
                writer.close()
    return True


@torch.no_grad()
def _of_block(
    job: Job, dataset: PackedDataset, blocks: _Blocks, block: range, packs: Iterator[Batch]
) -> np.ndarray:
    """Return the logarithms of the probabilities of the answers of a block's packs, float32
    [pairs, 2], on the ranks with the last chunk; nothing on others. Collective.
    """
    groups = job.groups
    objective = job.chunks[-1].objective
    found: list[Tensor] = []

    def keep(batch: Batch, output: Tensor) -> Tensor:
        found.append(objective.answers(output, batch).logprobs.view(-1, 2))
        return torch.zeros((), device=output.device)

    count = len(block) // groups.data_size
    run_pipeline(
        job.ddp_chunks,
        itertools.islice(packs, count),
        count,
        keep,
        job.backend,
        forward_only=True,
    )
    if not groups.has_last_chunk:
        return np.zeros((0, 2), np.float32)
    by_rank = [blocks.of_rank(block, rank) for rank in range(groups.data_size)]
    ids = np.array(by_rank)
    pairs = dataset.records(ids.ravel())["samples"].reshape(ids.shape) // 2
    rows = gather_rows(torch.cat(found), pairs.sum(axis=1).tolist(), groups.collection.dp)
    parts = np.split(rows.cpu().numpy(), np.cumsum(pairs.ravel())[:-1])
    # Of rank after rank; the packs go to the ranks in turn.
    order = np.arange(ids.size).reshape(ids.shape).T.ravel()
    wanted = min(block.stop, len(dataset)) - block.start
    return np.concatenate([parts[place] for place in order[:wanted]])


def _refuse_strange(dataset: PackedDataset, block: range, logprobs: np.ndarray) -> None:
    """Raise ReferenceError for a pair whose answers have no probability."""
    strange = np.flatnonzero(~np.isfinite(logprobs).all(axis=1))
    if not len(strange):
        return
    ids = np.arange(block.start, min(block.stop, len(dataset)))
    ends = np.cumsum(dataset.records(ids)["samples"] // 2)
    pack = int(np.searchsorted(ends, strange[0], side="right"))
    pair = int(strange[0] - (ends[pack - 1] if pack else 0))
    origin = dataset.origins(int(ids[pack]))[2 * pair]
    raise ReferenceError(
        f"{dataset.folder}: the reference model gives the answers of {origin} (pack {ids[pack]})"
        f" no probability ({logprobs[strange[0]].tolist()}); are the weights that the run starts"
        " from whole?"
    )
