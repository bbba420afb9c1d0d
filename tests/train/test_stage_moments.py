"""Moments that are older than others, as the optimizer sees them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavlm.parallel.adamw import Adam
from megavlm.train.optimizer import oldest, set_rates
from megavlm.train.stage_moments import age
from tests.ranks.runs import config_for

HISTORY = (
    (100, ("connector", "vision")),
    (30, ("vision.encoder.layers.2.*",)),
    (7, ("connector", "vision")),
)


@pytest.mark.parametrize(
    ("key", "updates"),
    [
        ("connector.mlp.linear_fc1.weight", 7),
        ("vision.encoder.layers.2.mlp.linear_fc1.weight", 137),
        ("language.output_layer.weight", 0),
        # Adapters that a later stage adds to what was trained in full.
        ("vision.encoder.layers.2.mlp.linear_fc1.lora.a", 0),
    ],
)
def test_a_stage_that_does_not_train_a_weight_ends_the_memory_of_it(key: str, updates: int) -> None:
    assert age(key, HISTORY) == updates


def test_young_and_old_moments_in_one_optimizer_move_weights_as_in_two(tmp_path: Path) -> None:
    config = config_for(tmp_path, steps=40, lr=0.01, warmup_ratio=0.2)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1, adam_eps=1e-3)
    )
    settings = config.optimizer
    earlier = 25
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(5, generator=generator) for name in ("old", "young")}
    options = dict(
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=0.1,
    )

    ours = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    groups = [
        {"params": [ours["old"]], "wd_mult": 1.0, "age": earlier},
        {"params": [ours["young"]], "wd_mult": 1.0, "age": 0},
    ]
    one = Adam(groups, **options)
    two = {name: torch.optim.AdamW([parameter], **options) for name, parameter in theirs.items()}
    assert oldest(one) == earlier
    for step in range(-earlier, 12):
        names = ("old", "young") if step >= 0 else ("old",)
        if step >= 0:
            rate = set_rates(one, config, step)
        for name in names:
            theirs[name].grad = torch.randn(5, generator=generator)
            ours[name].grad = theirs[name].grad.clone()
            if step >= 0:
                two[name].param_groups[0]["lr"] = rate
            two[name].step()
        one.step()
    for name in start:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) and not torch.equal(
            ours[name], start[name]
        )
