"""The moving average of the parameters: at every layout, across a resume, evaluated, exported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megavlm.config.averages import Ema, ema_problems
from megavlm.config.schema import Checkpoint, Config, Data, Eval, Optimizer
from megavlm.train.inspection import inspect
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_resume import STEPS, forget_the_end, losses, make_job, run_job, saved_tensors

DECAY = 0.7
SETTINGS = dict(trainable=("connector", "language"), lr=1e-2, warmup_ratio=0.0, adam_eps=1e-4)
SETTINGS |= dict(save_interval=1, eval_interval=3)
PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
# Ranks and settings; data-parallel ranks share the averages of each chunk, as they do moments.
EVERYWHERE = (8, PIPELINE | dict(tensor_model_parallel_size=2)) if asks_for_all() else (4, PIPELINE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8)
    return folder


def job(dataset: Path, save: Path, ema: Ema, **settings: object) -> Config:
    config = make_job(dataset, save, **SETTINGS | settings)
    data = dataclasses.replace(config.data, valid=str(dataset))
    return dataclasses.replace(config, ema=ema, data=data)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("averages") / "alone"
    ranks.run(run_job, 1, job(dataset, save, Ema(decay=DECAY)))
    return save


def tensors(ranks: Pool, save: Path, step: int) -> dict[str, torch.Tensor]:
    return ranks.run(saved_tensors, 1, save / f"step_{step:08d}")[0]


def valid_losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


def test_it_is_the_average_of_the_weights_of_all_steps(ranks: Pool, alone: Path) -> None:
    steps = [tensors(ranks, alone, step) for step in range(1, STEPS + 1)]
    keys = [key for key in steps[0] if key.startswith("ema.")]
    assert keys and {key.split(".")[2] for key in keys} == {"connector", "language"}
    for key in keys:
        weights = [step[key.removeprefix("ema.")] for step in steps]
        # The average of step 1 tells what the run began with.
        expected = steps[0][key]
        for weight in weights[1:]:
            expected = DECAY * expected + (1 - DECAY) * weight
        torch.testing.assert_close(steps[-1][key], expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(steps[-1][key], weights[-1])


def test_every_layout_averages_alike_and_a_run_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, alone: Path, tmp_path: Path
) -> None:
    world, layout = EVERYWHERE

    def everywhere(name: str) -> Config:
        return job(dataset, tmp_path / name, evaluated, save_interval=3, **layout)

    def assert_averages_are_those_of_one_process(found: dict[str, torch.Tensor]) -> None:
        for key, expected in tensors(ranks, alone, STEPS).items():
            if key.startswith("ema."):
                torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5)

    evaluated = Ema(decay=DECAY, evaluate=True)
    ranks.run(run_job, 1, job(dataset, tmp_path / "one", evaluated, save_interval=0))
    ranks.run(run_job, world, everywhere("whole"))
    # What is evaluated does not change what is trained.
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone), rel=1e-5)
    first, *others = zip(valid_losses(alone), valid_losses(tmp_path / "whole"), strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert all(abs(one / other - 1) > 1e-4 for one, other in others)
    assert valid_losses(tmp_path / "whole") == pytest.approx(
        valid_losses(tmp_path / "one"), rel=1e-5
    )
    found = tensors(ranks, tmp_path / "whole", STEPS)
    assert_averages_are_those_of_one_process(found)
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(run_job, world, everywhere("killed"))
    again = tensors(ranks, tmp_path / "killed", STEPS)
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], found[key]) for key in found)
    if asks_for_all():
        halves = dict(tensor_model_parallel_size=2, save_interval=STEPS)
        ranks.run(run_job, 2, job(dataset, tmp_path / "split", Ema(decay=DECAY), **halves))
        assert_averages_are_those_of_one_process(tensors(ranks, tmp_path / "split", STEPS))


def test_the_weights_of_an_export_are_the_averages(ranks: Pool, alone: Path) -> None:
    from megavlm.convert.dist_checkpoint import ShardsFolder

    step = alone / f"step_{STEPS:08d}"
    held = tensors(ranks, alone, STEPS)
    averaged = ShardsFolder(step / "shards", averages=True)
    plain = ShardsFolder(step / "shards")
    assert averaged.headers == plain.headers
    for key in plain.headers:
        name = f"ema.model.{key}"
        expected = held.get(name, held[f"model.{key}"])
        assert torch.equal(averaged[key], expected), key
        assert torch.equal(plain[key], held[f"model.{key}"]), key
        assert (name in held) == (averaged.ranges(key, range(1)) != plain.ranges(key, range(1)))


def test_settings_without_effect_are_refused(dataset: Path, tmp_path: Path) -> None:
    def told(ema: Ema, **changed: object) -> list[str]:
        config = dataclasses.replace(job(dataset, tmp_path, ema), **changed)
        return list(ema_problems(config))

    assert "less than 1, such as 0.999" in told(Ema(decay=1.0))[0]
    unseen = told(Ema(decay=0.9, evaluate=True), data=Data(train=str(dataset)))
    assert unseen[0].startswith("--ema.evaluate true needs --data.valid or --eval.tasks")
    exporting = Ema(decay=0.9, export=True)
    assert "needs --checkpoint.export_hf" in told(exporting)[0]
    assert not told(exporting, checkpoint=Checkpoint(save="runs", export_hf="out"))
    assert "use float32" in told(Ema(decay=0.9), optimizer=Optimizer(moments="bfloat16"))[0]
    assert Ema(decay=0.999, warmup=True).decay_at(0) == 0.1
    assert Ema(decay=0.999, warmup=True).decay_at(10**6) == 0.999


def test_weights_that_come_without_averages_are_not_measured_as_such(
    dataset: Path, alone: Path, tmp_path: Path
) -> None:
    asked = job(dataset, tmp_path / "new", Ema(decay=DECAY, evaluate=True), load=alone)
    asked = dataclasses.replace(asked, eval=Eval(only=True))
    assert inspect(asked, 1).state.step == STEPS
    for other in (
        dataclasses.replace(asked, stage="1"),
        dataclasses.replace(
            asked, checkpoint=dataclasses.replace(asked.checkpoint, weights_only=True)
        ),
    ):
        with pytest.raises(ValueError, match="--ema.evaluate true: with --eval.only true it needs"):
            inspect(other, 1)


def test_averages_begin_at_the_master_weights_that_a_stage_keeps(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    half = dict(precision="bfloat16", drop_path=0.0)
    first = job(dataset, tmp_path / "first", Ema(), stage="1", **half)
    ranks.run(run_job, 1, first)
    still = half | dict(load=tmp_path / "first", moments="keep", lr=1e-30, weight_decay=0.0)
    ranks.run(run_job, 1, job(dataset, tmp_path / "second", Ema(decay=DECAY), **still))
    held = tensors(ranks, tmp_path / "second", 1)
    averaged = [key for key in held if key.startswith("ema.")]
    assert averaged
    differs = 0
    for key in averaged:
        master = held["optimizer.state.param." + key.removeprefix("ema.")]
        torch.testing.assert_close(held[key], master, rtol=1e-6, atol=1e-8)
        differs += int((master != master.bfloat16().float()).sum())
    assert differs > 1000  # they are no rounded weights


def names_gathered(config: Config) -> list[tuple[str, ...]]:
    """Run a job, and list the tensors of a parameter that each gathering asks for."""
    from megavlm.train import optimizer_state

    asked: list[tuple[str, ...]] = []
    gather = optimizer_state._gather

    def counted(part: Any, own: Any, names: Sequence[str]) -> Any:
        asked.append(tuple(names))
        return gather(part, own, names)

    with mock.patch.object(optimizer_state, "_gather", counted):
        run_job(config)
    return asked


def test_moments_are_not_gathered_again_for_averages(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    config = job(dataset, tmp_path, Ema(decay=DECAY), save_interval=STEPS, eval_interval=0)
    [asked] = ranks.run(names_gathered, 1, config)
    assert asked == [("param", "exp_avg", "exp_avg_sq"), ("param",)]
