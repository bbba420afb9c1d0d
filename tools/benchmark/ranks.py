"""Processes that stand for ranks, one thread each, and what each of them builds."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def on_ranks(function: Callable, size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a world of its own, over gloo.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        RuntimeError: a rank failed; its own message is on the console.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="megavlm-ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(
                target=_serve, args=(sender, f"{folder}/store", rank, size, function, args)
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            answers = [receiver.recv() for receiver, _ in pipes]
            for process in ranks:  # which leave together, or one would complain of another
                process.join()
            return answers
        except EOFError:
            raise RuntimeError(f"a rank of {function.__name__} failed") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _serve(
    answer: Connection, store: str, rank: int, size: int, function: Callable, args: tuple
) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    from megavlm.parallel import gloo_workers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gloo_workers.install()
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    answer.send(function(*args))
    dist.barrier()


class Run:
    """A training run on this rank that steps on the same packs again and again.

    Args:
        config: the run.
        layout: of its pipeline.
        groups: process groups, and this rank's index in each.
        device_backend: where tensors live.
        packs: folder of the packs.
    """

    def __init__(self, config, layout, groups, device_backend, packs: Path):
        from megavlm.data.loading.dataset import PackedDataset
        from megavlm.model.weights import fill
        from megavlm.train.build_model import build_model
        from tools.benchmark.packs import fullest
        from tools.benchmark.trainer import random_weights

        self._config = config
        self._backend = device_backend
        dataset = PackedDataset(packs)
        draw = random_weights(device_backend.device)
        self._built = build_model(
            config, layout, groups, device_backend, lambda chunks: fill(chunks, draw)
        )
        ids = fullest(dataset, config.training.global_batch_size)
        self._batches = [dataset.batch(pack_id, number) for number, pack_id in enumerate(ids)]
        self._weight = sum(batch.weight_sum for batch in self._batches)

    def step(self) -> float:
        """Seconds of an update, once every rank is ready for it."""
        import torch.distributed as dist

        from megavlm.train.microbatches import Microbatches
        from megavlm.train.step import train_step

        dist.barrier()
        start = time.perf_counter()
        clip = self._config.optimizer.clip_grad
        packs = iter(self._batches)
        count = len(self._batches)
        step = Microbatches(packs, count, self._weight)
        train_step(self._built, step, clip, self._backend)
        dist.barrier()
        return time.perf_counter() - start

    def forward_and_backward(self) -> float:
        """Seconds of the packs of an update, without the optimizer's own work."""
        from megavlm.train.microbatches import Microbatches
        from megavlm.train.step import run_packs

        for chunk in self._built.ddp_chunks:
            chunk.zero_grad_buffer()
        start = time.perf_counter()
        run_packs(
            self._built.ddp_chunks,
            Microbatches(iter(self._batches), len(self._batches), self._weight),
            self._backend,
        )
        return time.perf_counter() - start
