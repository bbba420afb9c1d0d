"""Learning rates by part, by name and by layer, at every layout and across checkpoints."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.parameter_groups import decays, multiplier
from megavlm.config.schema import Config, Optimizer
from megavlm.planner.flops import pieces
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for, make_packs, train_curve, whole_weights
from tests.ranks.test_resume import forget_the_end, losses, make_job, resume_bit_for_bit, run_job

GROUPS = dict(
    decay="matrices",
    no_decay=("vision.position_embedding",),
    lr_multipliers=("vision=0.5", "connector=4", "*.linear_fc1.weight=0.25"),
    vision_layer_decay=0.8,
    language_layer_decay=0.9,
)
PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
BOTH = PIPELINE | dict(tensor_model_parallel_size=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8, alignment=4)
    return folder


def matrices_and_vectors(config: Config) -> dict[str, bool]:
    """Tell which parameters of the built model are matrices."""
    from megavlm.model.weights import named_weights
    from tests.ranks.runs import build

    [chunk] = build(config).chunks
    return {key: weight.squeeze().ndim > 1 for key, weight in named_weights(chunk).items()}


def test_the_table_knows_every_parameter_and_its_shape(ranks: Pool, dataset: Path) -> None:
    [found] = ranks.run(matrices_and_vectors, 1, config_for(dataset))
    assert {piece.key: piece.is_matrix for piece in pieces(TINY) if piece.elements} == found


def test_the_first_update_of_each_parameter_is_as_long_as_its_rate(
    ranks: Pool, dataset: Path
) -> None:
    # AdamW's first update is lr * sign(gradient), if epsilon is small beside the gradient.
    settings = dict(
        steps=1, lr=1e-3, warmup_ratio=0.0, weight_decay=0.0, adam_eps=1e-12, clip_grad=0.0
    )
    still = config_for(dataset, **settings | dict(lr=1e-20))
    [before] = ranks.run(train_curve, 1, still)
    config = config_for(dataset, **settings, **GROUPS, **BOTH)
    after = whole_weights(ranks.run(train_curve, 4, config))
    for key, start in whole_weights([before]).items():
        wanted = 1e-3 * multiplier(key, config.optimizer, TINY)
        assert np.abs(after[key] - start).max() == pytest.approx(wanted, rel=2e-3), key


# Warm-up of 4 of 20 steps from 1e-5 to 1e-3, and then down to 1e-4.
LOWEST = 1e-4
RUN = dict(lr=1e-3, warmup_steps=4, warmup_init_lr=1e-5, min_lr=LOWEST, weight_decay=0.1)
FALLS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "cosine": ({}, lambda step: 0.5 + 0.5 * math.cos(math.pi * (step - 4) / 16)),
    "linear": ({}, lambda step: (20 - step) / 16),
    "polynomial": (dict(power=2.0), lambda step: ((20 - step) / 16) ** 2),
    "WSD": (dict(wsd_decay_steps=6), lambda step: 1 - math.sqrt(max(step - 14, 0) / 6)),
    "step": (dict(step_interval=5, step_factor=0.3), lambda step: 0.3 ** ((step - 4) // 5)),
    "inverse-square-root": ({}, lambda step: math.sqrt(4 / step)),
    "constant": ({}, lambda step: 1.0),
}
DECAYS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.1,
    "linear": lambda step: 0.1 + 0.4 * step / 20,
    "cosine": lambda step: 0.3 - 0.2 * math.cos(math.pi * step / 20),
}


def rates_in_groups(config: Config, settings: list[Optimizer]) -> dict[str, list]:
    """Return the shape of every parameter, and the rates and weight decays that the optimizer has
    for it in each step of each run.
    """
    from megavlm.model.weights import named_weights
    from megavlm.train.optimizer import set_rates
    from tests.ranks.runs import build

    job = build(config)
    [chunk] = job.chunks
    found = {key: [tuple(weight.shape)] for key, weight in named_weights(chunk).items()}
    for optimizer in settings:
        run = replace(config, optimizer=optimizer)
        for step in range(20):
            set_rates(job.optimizer, run, step)
            for key, weight in named_weights(chunk).items():
                [part] = job.optimizer.chained_optimizers
                group = part.optimizer.param_groups[part.model_param_group_index_map[weight][0]]
                found[key].append((group["lr"], group["weight_decay"]))
    return found


def by_hand(key: str, shape: tuple[int, ...]) -> tuple[float, bool]:
    """Work out what ``GROUPS`` means for a parameter of the tiny model, whose two stacks have three
    layers each: the multiple of the rate, and whether it has weight decay.
    """
    part = key.split(".")[0]
    factor = {"vision": 0.5, "connector": 4.0, "language": 1.0}[part]
    if key.endswith(".linear_fc1.weight"):
        factor = 0.25
    rho = {"vision": 0.8, "connector": 1.0, "language": 0.9}[part]
    if layer := re.search(r"layers\.(\d)\.", key):
        factor *= rho ** (3 - int(layer[1]))
    elif "embedding" in key or key == "vision.class_token":
        factor *= rho**4
    is_matrix = sum(size > 1 for size in shape) > 1
    return factor, is_matrix and key != "vision.position_embedding"


def test_rates_and_decays_of_every_parameter_in_every_step_of_every_schedule(
    ranks: Pool, dataset: Path
) -> None:
    config = config_for(dataset, steps=20, **RUN, **GROUPS)
    shrinking = list(itertools.islice(itertools.cycle(DECAYS), len(FALLS)))
    settings = [
        replace(
            config.optimizer,
            schedule=schedule,
            weight_decay_schedule=decay,
            end_weight_decay=0.5 if decay != "constant" else 0.0,
            **FALLS[schedule][0],
        )
        for schedule, decay in zip(FALLS, shrinking, strict=True)
    ]
    [found] = ranks.run(rates_in_groups, 1, config, settings)
    for key, (shape, *rates) in found.items():
        factor, has_decay = by_hand(key, shape)
        wanted = []
        for schedule, decay in zip(FALLS, shrinking, strict=True):
            for step in range(20):
                fall = FALLS[schedule][1]
                if step < 4:
                    rate = 1e-5 + (1e-3 - 1e-5) * step / 4
                elif schedule in ("step", "inverse-square-root"):
                    rate = max(1e-3 * fall(step), LOWEST)
                else:
                    rate = LOWEST + (1e-3 - LOWEST) * fall(step)
                wanted.append((rate * factor, DECAYS[decay](step) * has_decay))
        np.testing.assert_allclose(rates, wanted, rtol=1e-9, atol=1e-18, err_msg=key)


def test_updates_are_those_of_one_process(ranks: Pool, dataset: Path) -> None:
    settings = GROUPS | dict(steps=3, adam_eps=1e-4, weight_decay=0.5)
    alone = ranks.run(train_curve, 1, config_for(dataset, **settings))
    world, layout = (8, BOTH) if asks_for_all() else (4, PIPELINE)
    shared = ranks.run(train_curve, world, config_for(dataset, **settings, **layout))
    assert shared[0].losses == pytest.approx(alone[0].losses, rel=1e-5)
    assert shared[0].grad_norms == pytest.approx(alone[0].grad_norms, rel=1e-5)
    wanted = whole_weights(alone)
    found = whole_weights(shared)
    for key, weight in wanted.items():
        np.testing.assert_allclose(found[key], weight, rtol=1e-5, atol=2e-6, err_msg=key)


def test_weight_decay_is_left_out_by_name(ranks: Pool, dataset: Path) -> None:
    settings = dict(steps=1, lr=1e-20, warmup_ratio=0.0, weight_decay=0.0, clip_grad=0.0)
    [start] = ranks.run(train_curve, 1, config_for(dataset, **settings))
    # Decay takes lr * weight_decay of a weight, and nothing else moves it noticeably.
    decayed = config_for(dataset, **settings | dict(weight_decay=1e19), **GROUPS)
    [end] = ranks.run(train_curve, 1, decayed)
    wanted = whole_weights([start])
    kinds = {piece.key: piece.is_matrix for piece in pieces(TINY)}
    for key, weight in whole_weights([end]).items():
        share = 0.1 * multiplier(key, decayed.optimizer, TINY)
        kept = 1 - share * decays(key, decayed.optimizer, is_matrix=kinds[key])
        np.testing.assert_allclose(weight, kept * wanted[key], 1e-5, 1e-15, err_msg=key)


# The run of Muon that resumes every day, in test_optimizer_kinds.py, has these groups too.
@pytest.mark.skipif(not asks_for_all(), reason="asked for by MEGAVLM_MATRIX=all")
def test_groups_survive_a_resume_bit_for_bit(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    settings = GROUPS | BOTH
    resume_bit_for_bit(ranks, 4, lambda save: make_job(dataset, save, **settings), tmp_path)


def test_moments_follow_their_parameters_into_other_groups(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    # Multipliers of nearly 1 change nothing but how the groups are divided.
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "whole"))
    forget_the_end(tmp_path / "whole", tmp_path / "divided")
    nearly = dict(lr_multipliers=("vision=1.0000001", "*.linear_fc1.weight=0.9999999"))
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "divided", **nearly))
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
    forget_the_end(tmp_path / "whole", tmp_path / "slow")
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "slow", lr_multipliers=("language=1e-6",)))
    assert losses(tmp_path / "slow") != pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-4)
