"""Numbers that no option can take."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.checks.numbers import number_problems
from megavlm.config.checks.rules import problems
from megavlm.config.schema import Config, Optimizer, Training

CONFIG = Config(stage="1", model="tiny")


@pytest.mark.parametrize(("seed", "is_refused"), [(2**63 - 1, False), (2**63, True), (2**70, True)])
def test_integers_have_64_bits(seed: int, is_refused: bool) -> None:
    config = dataclasses.replace(CONFIG, training=Training(seed=seed))
    found = list(number_problems(config))
    told = f"--training.seed {seed}: must be at most {2**63 - 1} (2**63 - 1)"
    assert found == ([told] if is_refused else [])
    assert set(found) <= set(problems(config, 1))


def test_no_rate_is_a_nan() -> None:
    config = dataclasses.replace(CONFIG, optimizer=Optimizer(weight_decay=float("nan")))
    assert any("--optimizer.weight_decay nan" in problem for problem in problems(config, 1))
