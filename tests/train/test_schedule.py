"""Learning rate and weight decay, against schedulers of transformers, timm and megatron-core."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from megavlm.config.checks.optimizer import optimizer_problems
from megavlm.config.schema import Optimizer, Training
from megavlm.model.vision import VisionEncoder
from megavlm.train.schedule import drop_path, learning_rate, weight_decay
from tools import plot_schedule

STEPS = 1000
LR = 4e-4
WARMUP = 37


def sgd() -> torch.optim.Optimizer:
    """Return an optimizer of which a scheduler sets the rate."""
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def of_transformers(name: str, steps: int, **settings: object) -> list[float]:
    """Return the rate of each update under a scheduler of transformers."""
    optimizer = sgd()
    scheduler = getattr(importlib.import_module("transformers.optimization"), name)(
        optimizer, **settings
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def of_timm(name: str, steps: int, **settings: object) -> list[float]:
    """Return the rate of each update under a scheduler of timm, stepped by updates. The package
    itself would import torchvision, its schedulers do not.
    """
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec, "timm is not installed; tests/run.sh does it"
        package = types.ModuleType("timm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["timm"] = package
    optimizer = sgd()
    scheduler = getattr(importlib.import_module("timm.scheduler"), name)(
        optimizer, t_in_epochs=False, **settings
    )
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    return rates


def of_megatron(steps: int, **settings: object) -> list[tuple[float, float]]:
    """Return learning rate and weight decay of each update under megatron-core's scheduler."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = sgd()
    given = dict(
        init_lr=0.0,
        max_lr=LR,
        min_lr=1e-5,
        lr_warmup_steps=WARMUP,
        lr_decay_steps=STEPS,
        start_wd=0.05,
        end_wd=0.05,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    scheduler = OptimizerParamScheduler(optimizer, **given | settings)
    rates = []
    for _ in range(steps):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        scheduler.step(1)
    return rates


def ours(optimizer: Optimizer, steps: int) -> list[float]:
    """Return the rate of each update, after the checks have accepted the settings."""
    assert not list(optimizer_problems(optimizer, Training(steps=STEPS)))
    return [learning_rate(step, optimizer, STEPS) for step in range(steps)]


def equal(found: list[float], wanted: list[float]) -> None:
    """Compare the rates of all updates."""
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert max(wanted) > min(wanted)


make = partial(Optimizer, lr=LR, warmup_steps=WARMUP)
WARM = dict(num_warmup_steps=WARMUP)
WHOLE = WARM | dict(num_training_steps=STEPS)
HUGGING_FACE = [
    (make(schedule="constant"), "get_constant_schedule_with_warmup", WARM),
    (make(), "get_cosine_schedule_with_warmup", WHOLE),
    (make(min_lr=3e-5), "get_cosine_with_min_lr_schedule_with_warmup", WHOLE | dict(min_lr=3e-5)),
    (
        make(min_lr_ratio=0.1),
        "get_cosine_with_min_lr_schedule_with_warmup",
        WHOLE | dict(min_lr_rate=0.1),
    ),
    (make(schedule="linear"), "get_linear_schedule_with_warmup", WHOLE),
    (
        make(schedule="linear", warmup_steps=0, warmup_ratio=0.0305),
        "get_linear_schedule_with_warmup",
        WHOLE | dict(num_warmup_steps=31),
    ),
    (
        make(schedule="polynomial", power=2.5, min_lr=1e-5),
        "get_polynomial_decay_schedule_with_warmup",
        WHOLE | dict(power=2.5, lr_end=1e-5),
    ),
    (
        make(schedule="polynomial", decay_steps=600),
        "get_polynomial_decay_schedule_with_warmup",
        WHOLE | dict(num_training_steps=600, lr_end=0.0),
    ),
    (make(schedule="inverse-square-root"), "get_inverse_sqrt_schedule", WARM),
    (
        make(schedule="inverse-square-root", timescale=200),
        "get_inverse_sqrt_schedule",
        WARM | dict(timescale=200),
    ),
    *(
        (
            make(
                schedule="WSD",
                wsd_decay_steps=150,
                wsd_decay=decay.replace("1-", "minus_"),
                min_lr_ratio=0.05,
                warmup_init_lr=0.05 * LR,
            ),
            "get_wsd_schedule",
            WHOLE | dict(num_decay_steps=150, decay_type=decay, min_lr_ratio=0.05),
        )
        for decay in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.parametrize(("optimizer", "name", "settings"), HUGGING_FACE)
def test_schedules_are_those_of_transformers(
    optimizer: Optimizer, name: str, settings: dict
) -> None:
    equal(ours(optimizer, STEPS), of_transformers(name, STEPS, **settings))


from_start = partial(make, warmup_init_lr=5e-7, counted_from="start")
TIMM_WARM = dict(warmup_t=WARMUP, warmup_lr_init=5e-7)
FALL = TIMM_WARM | dict(t_initial=STEPS, lr_min=5e-6)
TIMM = [
    (from_start(min_lr=5e-6), "CosineLRScheduler", FALL),
    (
        make(min_lr=5e-6, warmup_init_lr=5e-7, decay_steps=800),
        "CosineLRScheduler",
        FALL | dict(t_initial=800 - WARMUP, warmup_prefix=True),
    ),
    (
        from_start(schedule="polynomial", power=0.5, min_lr=5e-6),
        "PolyLRScheduler",
        FALL | dict(power=0.5),
    ),
    (
        from_start(schedule="step", step_interval=90, step_factor=0.3),
        "StepLRScheduler",
        TIMM_WARM | dict(decay_t=90, decay_rate=0.3, warmup_prefix=False),
    ),
    (  # how timm counts by default, since 0.9
        make(schedule="step", warmup_init_lr=5e-7, step_interval=90, step_factor=0.3),
        "StepLRScheduler",
        TIMM_WARM | dict(decay_t=90, decay_rate=0.3),
    ),
    (
        make(schedule="WSD", warmup_init_lr=5e-7, wsd_decay_steps=200, min_lr=5e-6),
        "WSDLRScheduler",
        FALL | dict(t_initial=STEPS - WARMUP, decay_t=200),
    ),
]


@pytest.mark.parametrize(("optimizer", "name", "settings"), TIMM)
def test_schedules_are_those_of_timm_stepped_by_updates(
    optimizer: Optimizer, name: str, settings: dict
) -> None:
    # Beyond the end too: there the lowest rate stays.
    equal(ours(optimizer, STEPS + 50), of_timm(name, STEPS + 50, **settings))


MEGATRON = [
    (make(schedule=schedule, min_lr=1e-5), dict(lr_decay_style=schedule))
    for schedule in ("cosine", "linear", "inverse-square-root")
] + [
    (
        make(schedule="WSD", min_lr=1e-5, wsd_decay_steps=100, wsd_decay=decay),
        dict(lr_decay_style="WSD", wsd_decay_steps=100, lr_wsd_decay_style=decay),
    )
    for decay in ("linear", "cosine", "minus_sqrt", "exponential")
]


@pytest.mark.parametrize(("optimizer", "settings"), MEGATRON)
def test_schedules_are_those_of_megatron(optimizer: Optimizer, settings: dict) -> None:
    equal(ours(optimizer, STEPS), [rate for rate, _ in of_megatron(STEPS, **settings)])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_goes_where_megatrons_goes(style: str) -> None:
    optimizer = make(weight_decay=0.04, weight_decay_schedule=style, end_weight_decay=0.4)
    wanted = of_megatron(
        STEPS, lr_decay_style="cosine", start_wd=0.04, end_wd=0.4, wd_incr_style=style
    )
    found = [weight_decay(step, optimizer, STEPS) for step in range(STEPS)]
    equal(found, [decay for _, decay in wanted])


def test_a_linear_schedule_falls_to_a_share_of_the_rate_as_swins() -> None:
    found = ours(make(schedule="linear", min_lr_ratio=0.01), STEPS + 5)
    passed = [(step - WARMUP) / (STEPS - WARMUP) for step in range(WARMUP, STEPS)]
    equal(found[WARMUP:STEPS], [LR - LR * (1 - 0.01) * share for share in passed])
    assert found[STEPS:] == pytest.approx([0.01 * LR] * 5)  # Swin's goes on falling


def test_constant_rates_stay() -> None:
    constant = Optimizer(lr=1.0, warmup_steps=2, schedule="constant", weight_decay=0.3)
    assert [learning_rate(step, constant, 10) for step in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert [weight_decay(step, constant, 10) for step in (0, 9)] == [0.3, 0.3]


def test_the_number_of_warmup_steps_wins_over_the_share() -> None:
    assert Optimizer(warmup_steps=0, warmup_ratio=0.03).warmup(1001) == math.ceil(30.03)
    assert Optimizer(warmup_steps=5, warmup_ratio=0.5).warmup(1000) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(power=2.0), "power 2.0 has no effect with --optimizer.schedule cosine"),
        (dict(schedule="constant", decay_steps=99), "decay_steps 99 has no effect"),
        (dict(schedule="constant", min_lr=1e-6), "min_lr 1e-06 has no effect"),
        (dict(schedule="WSD", counted_from="start", wsd_decay_steps=9), "counted_from start has"),
        (dict(schedule="WSD"), "wsd_decay_steps 0: must be from 1 to 963"),
        (dict(schedule="WSD", wsd_decay_steps=964), "must be from 1 to 963"),
        (dict(schedule="step"), "step_interval 0: must be 1 or more"),
        (dict(schedule="step", step_interval=9, step_factor=1.0), "step_factor 1.0: must be"),
        (dict(schedule="polynomial", power=0.0), "power 0.0: must be above 0"),
        (
            dict(schedule="inverse-square-root", warmup_steps=0, warmup_ratio=0.0),
            "without a warm-up needs --optimizer.timescale",
        ),
        (dict(decay_steps=37), "decay_steps 37 must be more than the 37 steps of the warm-up"),
        (dict(min_lr=1e-6, min_lr_ratio=0.1), "say the lowest rate once"),
        (dict(min_lr_ratio=1.5), "min_lr_ratio 1.5: must be from 0 to 1"),
        (dict(warmup_init_lr=1.0), "warmup_init_lr 1.0 is above --optimizer.lr"),
        (dict(warmup_init_lr=1e-6, warmup_steps=0, warmup_ratio=0.0), "no effect without a warm"),
        (dict(end_weight_decay=0.1), "end_weight_decay 0.1 has no effect"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict, words: str) -> None:
    found = list(optimizer_problems(make(**settings), Training(steps=STEPS)))
    assert len(found) == 1 and words in found[0], found


def test_the_tool_prints_draws_and_writes_the_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = "--stage 1 --train-iters 40 --lr 1 --lr-warmup-iters 4 --lr-decay-style linear"
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    run: Callable[[list[str]], int] = plot_schedule.main
    assert run([*command.split(), *files]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["update"] for row in rows] == [*range(1, 41)]
    assert rows[2]["lr"] == 0.5 and rows[22]["lr"] == 0.5 and rows[0]["decay"] == 0.05
    assert (tmp_path / "a.png").stat().st_size > 1000
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["3", "0.5", "0.05"] and printed[-1].split()[0] == "40"
    with pytest.raises(SystemExit):
        run([*command.split(), "--optimizer.power", "2"])
    assert "power 2.0 has no effect" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["--stage", "1", "--training.steps", "0"])
    assert "--training.steps 0" in capsys.readouterr().err


def test_a_configuration_file_without_a_model_will_do(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage: '1'\noptimizer: {lr: 1.0}\ntraining: {steps: 120}\n")
    run: Callable[[list[str]], int] = plot_schedule.main
    assert run(["--config", str(file), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())[100]["lr"] == 1.0


def test_drop_path_goes_from_its_first_rate_to_its_last() -> None:
    def rates(**settings) -> list[float]:
        training = Training(steps=5, drop_path=0.1, **settings)
        return [drop_path(step, training, 0) for step in range(5)]

    assert rates() == [0.1] * 5
    linear = rates(drop_path_schedule="linear", end_drop_path=0.5)
    assert linear == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-12)
    cosine = rates(drop_path_schedule="cosine", end_drop_path=0.0)
    assert cosine == pytest.approx([0.1, 0.0853553391, 0.05, 0.0146446609, 0.0], abs=1e-9)


def test_a_share_of_the_rates_drops_fewer_branches() -> None:
    encoder = mock.Mock(drop_path_rates=torch.tensor([[0.4]]), training=True, drop_path_share=1.0)
    draws = torch.tensor([[0.1, 0.3, 0.9]])
    kept = VisionEncoder.kept_paths(encoder, draws)
    assert kept[0].tolist() == pytest.approx([0, 0, 1 / 0.6])
    encoder.drop_path_share = 0.5
    kept = VisionEncoder.kept_paths(encoder, draws)
    assert kept[0].tolist() == pytest.approx([0, 1 / 0.8, 1 / 0.8])
