"""megavlm as a run would build it: configuration, model, gradient buffers, optimizer, loader, training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megavlm.config.rules import check
from megavlm.config.schema import Checkpoint, Config, Data, Fp8, Parallel
from megavlm.config.stages import STAGES
from megavlm.data.dataset import PackedDataset
from megavlm.data.plan import Plan
from megavlm.model import freeze, precision, weights
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, groups
from megavlm.parallel.layout import make_layout
from megavlm.train import optimizer
from megavlm.train.step import prepare, train_step
from tools.benchmark.cases import Case
from tools.benchmark.feed import Feed

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}


def make_config(case: Case, packs: PackedDataset) -> Config:
    """The stage's recipe for one rank and one pack a step; raises ConfigError for a case that cannot run."""
    row, recipe = STAGES[case.stage], case.precision.removeprefix("fp8_")
    is_fp8 = recipe != case.precision
    number = "bfloat16" if is_fp8 else PRECISIONS[case.precision]
    config = Config(
        stage=case.stage,
        model=case.model,
        architecture=case.architecture,
        data=Data(train=str(packs.folder), loss_reduction=row.data.loss_reduction),
        parallel=Parallel(recompute=case.recompute),
        optimizer=replace(row.optimizer, moments=case.moments),
        training=replace(row.training, precision=number, kernels=case.kernels, global_batch_size=1),
        fp8=Fp8(vision=recipe, language=recipe) if is_fp8 else Fp8(),
        checkpoint=Checkpoint(save_interval=0),
    )
    check(config, world_size=1, machine=precision.machine())
    return config


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
        self._config = config = make_config(case, packs)
        self._machine = machine = backend.start(config.parallel.timeout_minutes)
        self.device, self._packs = machine.device, packs
        place = groups.create(config.parallel, config.training.seed)
        model = VisionLanguageModel(config, make_layout(config), place).to(machine.device)
        weights.fill(model, random_weights(machine.device))
        freeze.apply(model, config.training.trainable)
        self._wrapped = optimizer.wrap(config, model)
        prepare(self._wrapped)
        self._optimizer = optimizer.build(config, self._wrapped)
        self._steps = 0
        self.feed = Feed(
            packs,
            Plan(num_packs=len(packs), seed=0, shuffle=False),
            pack_ids,
            reduction=config.data.loss_reduction,
            vision_layers=config.architecture.vision.num_layers,
            tile_multiple=precision.tile_multiple(config),
            workers=workers,
        )
        layers = "transformer_engine" if precision.uses_transformer_engine(config) else "local"
        self.notes = {"layers": layers, "moments": case.moments, "drop_path": config.training.drop_path}

    def step(self) -> Tensor:
        """One update; the loss, on the device."""
        weight = self._packs.weight_sum([self.feed.next_id], self._config.data.loss_reduction)
        optimizer.set_rates(self._optimizer, self._config, self._steps)
        self._steps += 1
        clip = self._config.optimizer.clip_grad
        return train_step(self._wrapped, self._optimizer, self.feed, 1, weight, clip, self._machine).loss

    def close(self) -> None:
        """End the loader's processes."""
        self.feed.close()
        groups.destroy()
        backend.stop()
