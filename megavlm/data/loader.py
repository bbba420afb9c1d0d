"""Batches ahead of time: worker processes read and decode the packs that the training process will ask for next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megavlm.data.batch import Batch
from megavlm.data.dataset import PackedDataset
from megavlm.data.plan import Plan


def batches(
    dataset: PackedDataset,
    plan: Plan,
    positions: Sequence[int],
    *,
    workers: int = 0,
    prefetch: int = 2,
    start_method: str | None = None,
    **options: Any,
) -> Generator[Batch, None, None]:
    """The batches at ``positions`` of the plan, in their order. Workers never change what a batch holds. ``close()`` ends the workers.

    Args:
        dataset: the packs.
        plan: their order.
        positions: places in the endless sequence of epochs. Rank r of n data ranks that goes on after ``consumed`` packs gives
            ``range(consumed + r, end, n)``, which takes no memory however long the run is.
        workers: processes that decode; 0: this one.
        prefetch: packs that each worker keeps ready.
        start_method: how workers start (fork, spawn, forkserver); None: as the platform does.
        options: keyword arguments of ``PackedDataset.batch``, which makes every batch.

    Raises:
        ValueError: a pack that cannot be read or decoded; names the pack and the sample's file and line.
        RuntimeError: a worker died; names the pack that was waited for and where its samples come from.
    """
    make = partial(dataset.batch, **options)
    loader = DataLoader(
        Positions(make, plan, positions),
        batch_size=None,
        # Otherwise the DataLoader draws from the global generator, and the training process would be changed by being fed.
        generator=torch.Generator(),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=start_method if workers else None,
    )
    arriving = iter(loader)
    try:
        for position in positions:
            try:
                batch = next(arriving)
            except Exception as error:
                if not workers:
                    raise
                # Without DataLoader's own frames, which keep the workers running as long as the error lives; its text has the worker's.
                error.with_traceback(None)
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise _worker_died(dataset, int(plan.at(position)), position, error) from error
            yield batch
    finally:
        # Nothing else holds DataLoader's iterator: letting go of it ends the workers.
        del arriving


def _worker_died(dataset: PackedDataset, pack_id: int, position: int, error: Exception) -> RuntimeError:
    """What is known about a worker that is gone: which pack was waited for."""
    return RuntimeError(
        f"{dataset.folder}: no batch for pack {pack_id} (position {position}), nor for those being made after it: {error} "
        "Out of memory (see the kernel log), a full /dev/shm, or a file that crashes the image decoder are common causes; "
        f"--data.workers 0 shows which. The pack's samples: {', '.join(dataset.origins(pack_id))}"
    )


class Positions(Dataset):
    """The batches of a plan's positions, as a map-style dataset of PyTorch."""

    def __init__(self, make: Callable[[int, int], Batch], plan: Plan, positions: Sequence[int]) -> None:
        self.make, self.plan, self.positions = make, plan, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> Batch:
        position = int(self.positions[place])
        return self.make(int(self.plan.at(position)), position)


def _unchanged(batch: Batch) -> Batch:
    """What a pack becomes on its way out of the DataLoader."""
    return batch


def _start_worker(worker: int) -> None:
    """One thread for each worker: many workers already fill the cores."""
    torch.set_num_threads(1)
