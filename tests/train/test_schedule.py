"""The learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from megavlm.config.schema import Optimizer
from megavlm.train.schedule import learning_rate, warmup_steps


def test_it_follows_hugging_faces_cosine_with_warmup() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = Optimizer(lr=4e-5, warmup_steps=7)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=optimizer.lr)
    reference = get_cosine_schedule_with_warmup(sgd, 7, 50)
    for step in range(50):
        assert learning_rate(step, optimizer, 50) == pytest.approx(
            sgd.param_groups[0]["lr"], rel=1e-12, abs=1e-20
        )
        sgd.step()
        reference.step()


def test_the_number_of_warmup_steps_wins_over_the_share() -> None:
    assert warmup_steps(Optimizer(warmup_steps=0, warmup_ratio=0.03), 1001) == math.ceil(30.03)
    assert warmup_steps(Optimizer(warmup_steps=5, warmup_ratio=0.5), 1000) == 5


def test_it_ends_at_the_lowest_rate_and_constant_stays() -> None:
    optimizer = Optimizer(lr=1.0, min_lr=0.1, warmup_ratio=0.0)
    assert learning_rate(0, optimizer, 10) == 1.0
    assert learning_rate(10, optimizer, 10) == pytest.approx(0.1)
    assert learning_rate(99, optimizer, 10) == pytest.approx(0.1)
    constant = Optimizer(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, constant, 10) for step in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
