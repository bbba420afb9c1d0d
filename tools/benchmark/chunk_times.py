"""How long each chunk of a pipeline takes on its own, forward and backward, against what the cost
model says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavlm.planner.layout import Layout, from_counts, make_layout
from megavlm.planner.partition import PackSize, layer_costs
from tools.benchmark.scaled import STAGE_NAMES, Scale, config

RANKS = 1


def measure(scale: Scale, packs: Path) -> list[dict]:
    """Chunks of several layouts for every stage; runs on one rank.

    Returns:
        For each chunk: stage, layout, number, FLOPs and seconds forward and backward, of one pack.
    """
    import torch

    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.parallel import backend, process_groups
    from tools.benchmark.packs import fullest

    alone = config(scale, STAGE_NAMES[0], packs)
    device_backend = backend.start(alone.parallel.timeout_minutes)
    groups = process_groups.create(alone.parallel, 0)
    dataset = PackedDataset(packs)
    [pack_id] = fullest(dataset, 1)
    size = PackSize.mean(dataset.index[np.array([pack_id])])
    batch = dataset.batch(pack_id, 0)
    rows = []
    chunks = []
    for stage in STAGE_NAMES:
        for layout in layouts(scale, stage, packs, size):
            torch.manual_seed(0)
            for number in range(len(layout.chunks)):
                settings = config(
                    scale, stage, packs, chunks=len(layout.chunks), layout=str(layout)
                )
                chunks.append(_Alone(settings, layout, groups, device_backend, number, batch))
                rows.append(
                    {
                        "stage": stage,
                        "layout": str(layout),
                        "chunk": number,
                        **flops(settings, layout, number, size),
                    }
                )
    seconds = [[chunk.run() for chunk in chunks] for _ in range(scale.rounds + 1)][1:]
    for row, taken in zip(rows, zip(*seconds, strict=True), strict=True):
        row["forward_s"], row["backward_s"] = (
            statistics.median(times) for times in zip(*taken, strict=True)
        )
    return rows


def layouts(scale: Scale, stage: str, packs: Path, size: PackSize) -> list[Layout]:
    """Layouts to measure: equal numbers of layers, the automatic ones, and one with a long and a
    short end.
    """
    vision = scale.architecture.vision.num_layers
    layers = vision + scale.architecture.language.num_layers
    made = [
        make_layout(config(scale, stage, packs, chunks=chunks, layout=layout), size)
        for chunks in (2, 4)
        for layout in ("auto", "even")
    ]
    made.append(from_counts((1, layers - 2, 1), vision))
    return list({str(layout): layout for layout in made}.values())


def flops(settings, layout: Layout, number: int, size: PackSize) -> dict[str, float]:
    """Predict the FLOPs of a chunk for one pack."""
    arch = settings.architecture
    layer_numbers = layout.chunks[number].layer_numbers(arch.vision.num_layers)
    forward, whole = (
        sum(layer_costs(arch, mask, size)[at] for at in layer_numbers)
        for mask in ((), settings.training.trainable)
    )
    return {"forward_flops": forward, "backward_flops": whole - forward}


class _Alone:
    """A chunk with made-up activations before it, and made-up gradients behind it."""

    def __init__(self, settings, layout: Layout, groups, device_backend, number: int, batch):
        import torch

        from megavlm.config.freeze_mask import matches_any, trains
        from megavlm.model.vlm import VisionLanguageModel
        from megavlm.model.weights import fill, named_weights
        from tools.benchmark.trainer import random_weights

        trainable = settings.training.trainable
        self._model = VisionLanguageModel(settings, layout, groups, number)
        fill([self._model], random_weights(device_backend.device))
        for key, parameter in named_weights(self._model).items():
            parameter.requires_grad_(matches_any(key, trainable))
        self._model.trains_vision = trains("vision", trainable)
        trained = [_trains(settings, layout, chunk) for chunk in range(len(layout.chunks))]
        self._model.first_trained = trained.index(True)
        self._batch = batch
        self._has_backward = number >= self._model.first_trained
        self._received = torch.randn(self._model.received_shape(batch)) if number else None

    def run(self) -> tuple[float, float]:
        """Seconds forward and backward."""
        import torch

        for parameter in self._model.parameters():
            parameter.grad = None
        if self._received is not None:
            self._model.set_input_tensor(self._received.detach().requires_grad_())
        start = time.perf_counter()
        output = self._model(self._batch)
        middle = time.perf_counter()
        if self._has_backward:
            output.backward(torch.ones_like(output))
        return middle - start, time.perf_counter() - middle


def _trains(settings, layout: Layout, number: int) -> bool:
    from megavlm.planner.parameters import parameters_on_rank

    return parameters_on_rank(settings, layout.chunks[number]).trained > 0


def summary(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """How well the cost model foretells the times of each stage: one rate, FLOPs a second, for all
    of them.

    Returns:
        By stage: chunks, Spearman's rank correlation of FLOPs and times, and the median and the
            largest relative error of a chunk's time.
    """
    taken = np.array([row["forward_s"] + row["backward_s"] for row in rows])
    asked = np.array([row["forward_flops"] + row["backward_flops"] for row in rows])
    rate = np.exp(np.median(np.log(asked / taken)))
    stages = np.array([row["stage"] for row in rows])
    found = {}
    for stage in dict.fromkeys(stages.tolist()):
        chosen = stages == stage
        errors = np.abs(taken[chosen] / (asked[chosen] / rate) - 1)
        found[stage] = {
            "chunks": int(chosen.sum()),
            "spearman": spearman(asked[chosen], taken[chosen]),
            "median_error": float(np.median(errors)),
            "worst_error": float(errors.max()),
        }
    return found


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    ranks = [
        ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)) / 2
        for values in (left, right)
    ]
    return float(np.corrcoef(*ranks)[0, 1])
