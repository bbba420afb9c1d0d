"""Numbers that no option can take."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megavlm.config.checks.numbers import number_problems
from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse
from megavlm.config.options import options
from megavlm.config.schema import Config, Optimizer, Training
from tests.config.test_cli import with_value

CONFIG = Config(stage="1", model="tiny")


@pytest.mark.parametrize(("seed", "is_refused"), [(2**63 - 1, False), (2**63, True), (2**70, True)])
def test_integers_have_64_bits(seed: int, is_refused: bool) -> None:
    config = dataclasses.replace(CONFIG, training=Training(seed=seed))
    found = list(number_problems(config))
    told = f"--training.seed {seed}: must be at most {2**63 - 1} (2**63 - 1)"
    assert found == ([told] if is_refused else [])
    assert set(found) <= set(problems(config, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    config = dataclasses.replace(CONFIG, optimizer=Optimizer(lr=value))
    told = f"--optimizer.lr {value}: must be a finite number"
    assert problems(config, 1) == [told]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture.vision.layernorm_epsilon", -1.0),
        ("architecture.language.layernorm_epsilon", -1.0),
        ("architecture.connector.qformer.layernorm_epsilon", -1.0),
        ("architecture.language.rotary_base", 0.0),
        ("health.hang_factor", math.nan),
        ("health.lost_machine_seconds", -1),
    ],
)
def test_values_without_a_meaning_are_refused(key: str, value: float) -> None:
    config = with_value(parse(["--recipe", "blip2", "--stage", "2"]), key, value)
    assert any(f"--{key} {value}: must be" in problem for problem in problems(config, 1))


@pytest.mark.parametrize(
    "recipe",
    ["internvl --stage 2 --model tiny --fp8.language mxfp8", "clip --stage 1", "blip2 --stage 1"],
)
def test_no_value_ends_the_checks(recipe: str) -> None:
    # Each is named by one of them, and others run beside it.
    usual = parse(["--recipe", *recipe.split(" ")])
    experts = dict(num_experts=4, experts_per_token=2, expert_ffn_hidden_size=64)
    for name, value in experts.items() if "tiny" in recipe else ():
        usual = with_value(usual, f"architecture.language.{name}", value)
    tried = {int: (0, -1), float: (0.0, -1.0, math.nan, math.inf), str: ("", "nonsense")}
    named = {"architecture.objective"}  # an unknown one is told alone, as an unknown recipe is
    for option in (one for one in options().values() if one.key not in named):
        for value in tried.get(option.kind, ()):
            problems(with_value(usual, option.key, value), 2)
