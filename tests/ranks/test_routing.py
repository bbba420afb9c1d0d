"""What routers remember from step to step: it is that of one process at every layout, evaluation
and skipped steps change nothing of it, and a run that resumes has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import Config
from tests.ranks.layouts import LIMIT, MASKS, asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, train_curve
from tests.ranks.test_experts import LAYOUTS, Layout, compare, expert_config, expert_job
from tests.ranks.test_experts import dataset as dataset
from tests.ranks.test_resume import forget_the_end, losses, run_job, saved_tensors

SETTINGS = dict(balance_over="global_batch", global_batch_size=6)
CASES = [
    Layout(expert=2, pipeline=2, data=2, other=(("recompute", "full"),), everyday=("2",)),
    Layout(expert=2, tensor=2, other=(("dispatcher", "allgather"),), everyday=("2",)),
    Layout(data=3),
    Layout(tensor=2, data=3),
    *(layout for layout in LAYOUTS if 6 % layout.data == 0),
]


def remembering(dataset: Path, **settings: Any) -> Config:
    return expert_config(dataset, **SETTINGS | dict(trainable=MASKS["2"], steps=3) | settings)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[], Curve]:
    """Return a cached function that trains in one process."""
    return cache(lambda: ranks.run(train_curve, 1, remembering(dataset))[0])


@pytest.mark.parametrize("layout", CASES if asks_for_all() else CASES[:2], ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Callable[[], Curve], layout: Layout
) -> None:
    curves = ranks.run(train_curve, layout.ranks, remembering(dataset, **layout.settings))
    found = compare(curves, alone())
    assert max(found.values()) <= LIMIT, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What the routers of a layer know of a step.

    Args:
        choices: of each expert in each pack, counted by hand.
        scores: sum of each expert's score over a pack's tokens, and the number of these.
        shares: that the router remembers, after the step.
        load: of the router, after the step.
    """

    choices: list[list[float]]
    scores: list[tuple[list[float], int]]
    shares: list[float]
    load: list[float]


def steps_by_hand(config: Config, skips: tuple[bool, ...]) -> list[Memory]:
    """Run steps, each on the first packs, in one process, with an evaluation before and after; what
    the first layer's router knows of each step.
    """
    from megavlm.train.evaluate import evaluating
    from megavlm.train.step import run_packs, train_step

    job = build(config)
    size = config.training.global_batch_size
    router = job.chunks[0].routers[0]
    seen: list[tuple[Any, Any]] = []

    def look(module, inputs, output):
        real = (~inputs[1]).flatten()
        scores = (inputs[0].flatten(0, 1)[real] @ module.weight.T).softmax(-1)
        seen.append((output[1].sum(0).tolist(), (scores.sum(0).tolist(), len(scores))))

    router.register_forward_hook(look)
    batches = [job.train.batch(pack, 0, vision_layers=2) for pack in range(size)]
    found = []
    for is_skipped in skips:
        for forward_only in (True, False, True):
            seen.clear()
            router.load.zero_()
            if forward_only:
                with evaluating(job.ddp_chunks), torch.no_grad():
                    run_packs(
                        job.ddp_chunks, iter(batches), size, 1.0, job.backend, forward_only=True
                    )
                continue
            train_step(
                job.ddp_chunks,
                job.optimizer,
                iter(batches),
                size,
                100.0,
                1.0,
                job.backend,
                skips=lambda loss, norm, is_skipped=is_skipped: is_skipped,
            )
            # With recomputation each pack is seen twice, one after the other.
            choices, scores = zip(*seen[:: len(seen) // size], strict=True)
            load = router.load.tolist()
        found.append(
            Memory(
                choices=list(choices),
                scores=list(scores),
                shares=router.shares.tolist(),
                load=load,
            )
        )
    return found


def test_the_balance_is_over_the_choices_of_the_last_step(ranks: Pool, dataset: Path) -> None:
    config = remembering(dataset, recompute="full")
    [steps] = ranks.run(steps_by_hand, 1, config, (False, True, False))
    before = [1 / 8] * 8
    for number, step in enumerate(steps):
        expected = sum(
            8 * sum(share * score / tokens for share, score in zip(before, scores, strict=True))
            for scores, tokens in step.scores
        )
        *_, balance, packs = step.load
        assert (balance, packs) == (pytest.approx(expected, rel=1e-5), 6)
        choices = [sum(of_pack) for of_pack in zip(*step.choices, strict=True)]
        if number != 1:  # a skipped step
            before = [count / sum(choices) for count in choices]
        assert step.shares == pytest.approx(before, rel=1e-6)


def test_the_first_step_has_no_balance_loss(ranks: Pool, dataset: Path) -> None:
    with_loss, without = (
        ranks.run(train_curve, 1, remembering(dataset, router_z_loss=0.0, steps=2, **weights))[0]
        for weights in ({}, dict(balance_loss=0.0))
    )
    assert with_loss.grad_norms[0] == pytest.approx(without.grad_norms[0], rel=1e-6)
    assert with_loss.grad_norms[1] != pytest.approx(without.grad_norms[1], rel=1e-3)


def test_a_run_resumes_bit_for_bit(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    layout = Layout(expert=2, pipeline=2, data=2).settings
    for name in ("whole", "killed"):
        job = expert_job(dataset, tmp_path / name, **layout)
        experts = dataclasses.replace(job.experts, balance_over="global_batch")
        ranks.run(run_job, 4, dataclasses.replace(job, experts=experts))
        if name == "whole":
            forget_the_end(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[3:]
    whole, killed = (
        ranks.run(saved_tensors, 1, tmp_path / name / "step_00000006")[0]
        for name in ("whole", "killed")
    )
    assert len(set(whole["routers.1.shares"].tolist())) > 2
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
