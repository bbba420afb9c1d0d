"""What a model without a vision encoder refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse
from megavlm.job_checks import parameter_problems


def found(packs: Path, options: str) -> list[str]:
    saved = ["--data.train", str(packs), "--checkpoint.save", str(packs.parent / "run")]
    config = parse(["--recipe", "fuyu", "--stage", "1", *saved, *options.split()])
    return problems(config, 2)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--parallel.tensor_model_parallel_size 2 --parallel.sequence_parallel true",
        "--parallel.pipeline_model_parallel_size 2 --parallel.layout t*18|t*18",
        "--parallel.pipeline_model_parallel_size 2 --parallel.layout c,t*18|t*18,h",
        "--parallel.context_parallel_size 2",
        "--training.trainable connector",
    ],
)
def test_what_is_meant_to_run_has_no_problems(packs: Path, options: str) -> None:
    assert found(packs, options) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--training.trainable vision,language", "--training.trainable vision: there is no"),
        ("--training.trainable vision.encoder.layers.0", "vision.encoder.layers.0: there is no"),
        ("--init.vision here", "--init.vision here: there is no vision encoder"),
        ("--fp8.vision tensorwise", "--fp8.vision tensorwise: there is no vision encoder"),
        ("--optimizer.vision_layer_decay 0.9", "--optimizer.vision_layer_decay 0.9: there is no"),
        ("--architecture.vision.hidden_size 64", "vision.hidden_size 64: there is no"),
        ("--architecture.vision.family clip", "vision.family clip: there is no"),
        ("--architecture.connector.kind mlp", "connector.kind mlp: there is no"),
        ("--architecture.vision.image_size 45", "patch_size 30 does not divide"),
        ("--architecture.vision.num_layers -1", "num_layers -1: must be 0 or more"),
        ("--parallel.pipeline_model_parallel_size 2 --parallel.layout v,t*36", "has 1 x v"),
        ("--parallel.pipeline_model_parallel_size 64", "36 layers (0 of the vision encoder, 36"),
    ],
)
def test_what_only_a_vision_encoder_could_do_is_refused(
    packs: Path, options: str, told: str
) -> None:
    listed = found(packs, options)
    assert any(told in problem for problem in listed), listed


def test_layers_of_the_vision_encoder_are_no_range(packs: Path) -> None:
    options = "--training.trainable vision.layers.-2:"
    with pytest.raises(SystemExit):
        found(packs, options)


def test_learning_rates_of_the_vision_encoder_mean_nothing(packs: Path) -> None:
    config = parse(["--recipe", "fuyu", "--stage", "1", "--optimizer.lr_multipliers", "vision=2"])
    assert any("vision" in problem for problem in parameter_problems(config))
