"""megavlm as a run would build it: configuration, model, gradient buffers, optimizer, loader,
training step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from megavlm.config.checks.rules import check
from megavlm.data.loading.batch import options_of
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Plan
from megavlm.model import precision, weights
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import make_layout
from megavlm.train import optimizer
from megavlm.train.build_model import build_model
from megavlm.train.microbatches import Microbatches
from megavlm.train.step import train_step
from tools.benchmark.cases import Case
from tools.benchmark.feed import Feed


def random_weights(device: torch.device) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Weights drawn on the device: a large model's take a CPU longer than the measurement."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith(("norm.weight", "layer_norm_weight", "_scale")):
            return torch.ones(shape, device=device)
        if len(shape) == 1:
            return torch.zeros(shape, device=device)
        return torch.randn(shape, device=device, generator=generator) * 0.02

    return draw


class Trainer:
    """One rank of a training run.

    Args:
        case: what is measured.
        packs: what it trains on.
        pack_ids: the packs that are taken, again and again.
        workers: loader processes.
    """

    def __init__(self, case: Case, packs: PackedDataset, pack_ids: list[int], workers: int):
        self._config = config = case.config(str(packs.folder))
        check(config, world_size=1, device=precision.device_capabilities())
        self._backend = device_backend = backend.start(config.parallel.timeout_minutes)
        self.device = device_backend.device
        self._packs = packs
        groups = process_groups.create(config.parallel, config.training.seed)
        drawn = random_weights(device_backend.device)
        self._built = build_model(
            config,
            make_layout(config),
            groups,
            device_backend,
            lambda chunks: weights.fill(chunks, drawn),
        )
        self._steps = 0
        self.feed = Feed(
            packs,
            Plan(num_packs=len(packs), seed=0, shuffle=False),
            pack_ids,
            dataclasses.replace(
                options_of(config.architecture),
                reduction=config.data.loss_reduction,
                tile_multiple=precision.tile_multiple(config),
            ),
            workers,
        )
        layers = "transformer_engine" if precision.uses_transformer_engine(config) else "local"
        self.notes = {
            "layers": layers,
            "moments": case.moments,
            "drop_path": config.training.drop_path,
        }

    def step(self) -> Tensor:
        """One update; the loss, on the device."""
        count = self._config.training.global_batch_size
        weight = self._packs.weight_sum(self.feed.next_ids(count), self._config.data.loss_reduction)
        optimizer.set_rates(self._built.optimizer, self._config, self._steps)
        self._steps += 1
        clip = self._config.optimizer.clip_grad
        return train_step(
            self._built,
            Microbatches(self.feed, count, weight),
            clip,
            self._backend,
        ).loss

    def close(self) -> None:
        """End the loader's processes."""
        self.feed.close()
        process_groups.destroy()
        backend.stop()
