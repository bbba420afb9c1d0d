"""Freeze masks that name experts or routers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.config.schema import Config, Experts
from tests.ranks.pool import Pool
from tests.ranks.runs import train_curve
from tests.ranks.test_experts import LIMIT, Layout, compare, expert_config, expert_job
from tests.ranks.test_experts import dataset as dataset
from tests.ranks.test_resume import resume_bit_for_bit

EXPERTS = "language.decoder.layers.*.mlp.experts"
ROUTERS = "language.decoder.layers.*.mlp.router"


@pytest.mark.parametrize("layout", [Layout(), Layout(expert=2, data=2)], ids=str)
def test_experts_alone_resume_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path, layout: Layout
) -> None:
    """The part of the optimizer for all else is then empty."""

    def job(save: Path) -> Config:
        made = expert_job(dataset, save, trainable=(EXPERTS,), **layout.settings)
        return dataclasses.replace(made, experts=Experts())

    whole = resume_bit_for_bit(ranks, layout.ranks, job, tmp_path)
    moments = [key for key in whole if "exp_avg_sq" in key]
    assert len(moments) == 2 * 8 * 2 and all(".mlp.experts." in key for key in moments)


def test_routers_alone_train_like_one_process(ranks: Pool, dataset: Path) -> None:
    settings = dict(trainable=(ROUTERS,), steps=3)
    [expected] = ranks.run(train_curve, 1, expert_config(dataset, **settings))
    assert expected.grad_norms[0] > 0
    layout = Layout(expert=2, pipeline=2, data=2).settings
    curves = ranks.run(train_curve, 4, expert_config(dataset, **settings, **layout))
    assert max(compare(curves, expected).values()) <= LIMIT


@pytest.mark.parametrize(
    "layout",
    [Layout(expert=2, data=2), Layout(expert=2, pipeline=2, data=2)],
    ids=str,
)
def test_one_expert_trains_like_one_process_where_another_rank_trains_none(
    ranks: Pool, dataset: Path, layout: Layout
) -> None:
    settings = dict(trainable=(f"{EXPERTS}.1.*",), steps=3)
    [expected] = ranks.run(train_curve, 1, expert_config(dataset, **settings))
    assert expected.grad_norms[0] > 0
    curves = ranks.run(
        train_curve, layout.ranks, expert_config(dataset, **settings, **layout.settings)
    )
    assert max(compare(curves, expected).values()) <= LIMIT
