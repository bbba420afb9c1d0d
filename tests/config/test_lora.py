"""Which linear layers have adapters, and what the freeze mask calls them."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.cli import parse
from megavlm.config.layer_ranges import with_layers
from megavlm.config.lora import Lora, lora_problems
from megavlm.config.schema import Config
from megavlm.planner.parameter_table import parameter_keys


def resolved(*targets: str, model: str = "tiny") -> Config:
    """Return a run of the tiny model whose adapters alone train."""
    config = parse(["--model", model, "--stage", "2", "--data.train", "packs"], find_problems=None)
    training = dataclasses.replace(config.training, trainable=())
    lora = Lora(rank=2, targets=targets)
    architecture = dataclasses.replace(config.architecture, lora=lora)
    return with_layers(dataclasses.replace(config, training=training, architecture=architecture))


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("language", ["language"]),
        ("*decoder*", ["language"]),
        ("*.decoder.*.linear_fc2", ["language"]),
        ("*.linear_fc2", ["vision", "language"]),
        ("vision.layers.-1", ["vision"]),
    ],
)
def test_the_parts_with_adapters_are_those_of_the_layers(target: str, parts: list[str]) -> None:
    config = resolved(target)
    trainable = config.training.trainable
    assert list(trainable) == [f"{part}.*.lora" for part in parts]
    assert not list(lora_problems(config.architecture.lora, trainable, parameter_keys(config)))


def test_experts_have_adapters_by_name() -> None:
    config = resolved("language.*.experts.*.linear_fc2", model="internvl3_5-30b-a3b")
    assert list(config.training.trainable) == ["language.*.lora"]
    keys = parameter_keys(config)
    assert not list(lora_problems(config.architecture.lora, ("language.*.lora",), keys))
    assert sum(".lora." in key for key in keys) == 48 * 128 * 2


def test_a_target_without_linear_layers_is_named_once() -> None:
    config = resolved("*.nothing")
    problems = list(
        lora_problems(config.architecture.lora, config.training.trainable, parameter_keys(config))
    )
    assert len(problems) == 1 and "*.nothing: means no linear layer" in problems[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(rank=0), "--architecture.lora.dora has no effect without --architecture.lora.rank"),
        (dict(dropout=0.1), "--architecture.lora.dropout 0.1: with --architecture.lora.dora true"),
        (dict(nf4=("language",)), "--architecture.lora.dora true reads the frozen weights for"),
    ],
)
def test_what_dora_excludes_is_refused(settings: dict, told: str) -> None:
    config = resolved("language")
    lora = dataclasses.replace(config.architecture.lora, **settings, dora=True)
    targets = Lora().targets if not lora.rank else lora.targets
    lora = dataclasses.replace(lora, targets=targets)
    [problem] = lora_problems(lora, config.training.trainable, parameter_keys(config))
    assert problem.startswith(told)
