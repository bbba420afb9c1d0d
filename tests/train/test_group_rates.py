"""Learning rates of groups, as metrics show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.train.group_rates import GroupRates
from tests.ranks.runs import config_for


def test_one_rate_needs_no_groups() -> None:
    assert GroupRates(config_for(Path("packs"))).at(5, 0.1) == {}


def test_groups_have_their_part_and_multiplier_in_their_name() -> None:
    settings = dict(
        lr_multipliers=("vision=0.5", "language.output_layer=0.25"), frozen_until=("vision=3",)
    )
    rates = GroupRates(config_for(Path("packs"), **settings))
    late = {"vision": 0.0, "connector": 0.1, "language x1": 0.1, "language x0.25": 0.025}
    assert rates.at(2, 0.1) == {"lr": pytest.approx(late)}
    assert rates.at(3, 0.1)["lr"]["vision"] == pytest.approx(0.05)
