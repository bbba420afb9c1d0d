"""What an update does with the gradient and with the averages, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavlm.config.averages import Ema
from megavlm.train.averages import Averages
from megavlm.train.optimizer import Gradient, update_weights


@pytest.mark.parametrize(("clip_grad", "factor"), [(1.0, 0.2), (5.0, 1.0), (50.0, 1.0), (0.0, 1.0)])
def test_only_gradients_above_the_bound_are_clipped(clip_grad: float, factor: float) -> None:
    shards = [torch.tensor([3.0]), torch.tensor([4.0])]
    gradient = Gradient(norm=torch.tensor(5.0), by_part=torch.empty(0), shards=shards)
    optimizer: Any = SimpleNamespace(step_with_ready_grads=lambda: None)
    update_weights(optimizer, gradient, clip_grad)
    assert torch.cat(shards).tolist() == pytest.approx([3 * factor, 4 * factor], rel=1e-5)


def test_the_warm_up_of_averages_counts_the_updates_before() -> None:
    weight = torch.tensor([1.0])
    part = SimpleNamespace(get_parameters=lambda: [weight])
    optimizer: Any = SimpleNamespace(chained_optimizers=[part])
    averages = Averages(
        settings=Ema(decay=0.2, warmup=True), optimizer=optimizer, shards=[torch.zeros(1)]
    )
    left = 1.0
    for updates, stays in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        averages.update(updates)
        left *= stays
        assert averages.shards[0].item() == pytest.approx(1 - left, rel=1e-6)
