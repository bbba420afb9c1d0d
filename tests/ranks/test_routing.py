"""Routers with all their options, and a shared expert: they train like one process at every layout;
evaluation and skipped steps change nothing of what routers remember, and a run that resumes has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.layouts import LIMIT, MASKS, asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, train_curve
from tests.ranks.test_experts import LAYOUTS, Layout, compare, expert_config, expert_job
from tests.ranks.test_experts import MODEL as DROPLESS
from tests.ranks.test_experts import dataset as dataset
from tests.ranks.test_resume import resume_bit_for_bit

SETTINGS = dict(balance_over="global_batch", bias_update_rate=0.01, global_batch_size=6)
MODEL = dataclasses.replace(
    DROPLESS,
    language=dataclasses.replace(
        DROPLESS.language,
        router_scores="sigmoid",
        router_bias=True,
        routed_scaling=2.5,
        shared_expert_ffn_hidden_size=20,
        shared_expert_gate=True,
    ),
)
# A class of transformers has it.
EXPORTED = dataclasses.replace(
    MODEL,
    language=dataclasses.replace(
        MODEL.language, family="dots1", shared_expert_ffn_hidden_size=24, shared_expert_gate=False
    ),
)
BIAS = "language.decoder.layers.1.mlp.router.expert_bias"
CASES = [
    Layout(expert=2, pipeline=2, data=2, other=(("recompute", "full"),), everyday=("2",)),
    Layout(expert=2, tensor=2, other=(("dispatcher", "allgather"),), everyday=("2",)),
    Layout(expert=2, context=2, other=(("recompute", "selective"),), everyday=("2",)),
    Layout(data=3),
    Layout(tensor=2, data=3),
    # Six packs a step must divide, those of a rank with several chunks by the pipeline's ranks.
    *(
        layout
        for layout in LAYOUTS
        if 6 % (layout.data * (layout.pipeline if layout.virtual > 1 else 1)) == 0
    ),
]


def remembering(dataset: Path, **settings: Any) -> Config:
    return expert_config(
        dataset, MODEL, **SETTINGS | dict(trainable=MASKS["2"], steps=3) | settings
    )


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[], Curve]:
    """Return a cached function that trains in one process."""
    return cache(lambda: ranks.run(train_curve, 1, remembering(dataset))[0])


@pytest.mark.parametrize("layout", CASES if asks_for_all() else CASES[:3], ids=str)
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
        by_score: the same without the bias.
        scores: sum of each expert's score over a pack's tokens, and the number of these.
        shares, bias: that the router remembers, after the step.
        load: of the router, after the step.
    """

    choices: list[list[float]]
    by_score: list[list[float]]
    scores: list[tuple[list[float], int]]
    shares: list[float]
    bias: list[float]
    load: list[float]


def watched(router: Any) -> list[tuple[Any, ...]]:
    """Return a list that gets an entry from each forward pass of a router: choices of each expert,
    those without the bias, the sum of its shares of the scores, and the number of tokens. What the
    router returns is compared with what the scores and biases say.
    """
    seen: list[tuple[Any, ...]] = []

    def look(module, inputs, output):
        real = (~inputs[1]).flatten()
        scores = (inputs[0].flatten(0, 1)[real] @ module.weight.T).sigmoid()
        weights, routed = (values[real] for values in output)
        chosen, by_score = (
            torch.zeros_like(routed).scatter(1, values.topk(3).indices, True)
            for values in (scores + module.expert_bias, scores)
        )
        assert torch.equal(routed, chosen)
        expected = scores * chosen
        expected = 2.5 * expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(weights, expected)
        shares = scores / scores.sum(-1, keepdim=True)
        counts = (values.sum(0).tolist() for values in (routed, by_score, shares))
        seen.append((*counts, len(scores)))

    router.register_forward_hook(look)
    return seen


def steps_by_hand(config: Config, skips: tuple[bool, ...]) -> list[Memory]:
    """Run steps, each on the first packs, in one process, with an evaluation before and after; what
    the first layer's router knows of each step.
    """
    from megavlm.train.evaluate import evaluating
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs, train_step

    job = build(config)
    size = config.training.global_batch_size
    router = job.chunks[0].routers[0]
    seen = watched(router)
    batches = [job.train.batch(pack, 0, BatchOptions(vision_layers=2)) for pack in range(size)]
    found = []
    for is_skipped in skips:
        for forward_only in (True, False, True):
            seen.clear()
            router.load.zero_()
            if forward_only:
                with evaluating(job.ddp_chunks), torch.no_grad():
                    packs = Microbatches(iter(batches), size, 1.0)
                    run_packs(job.ddp_chunks, packs, job.backend, forward_only=True)
                continue
            train_step(
                job,
                Microbatches(iter(batches), size, 100.0),
                1.0,
                job.backend,
                skips=lambda loss, norm, is_skipped=is_skipped: is_skipped,
            )
            # With recomputation each pack is seen twice, one after the other.
            choices, by_score, scores, tokens = zip(*seen[:: len(seen) // size], strict=True)
            load = router.load.tolist()
        found.append(
            Memory(
                choices=list(choices),
                by_score=list(by_score),
                scores=list(zip(scores, tokens, strict=True)),
                shares=router.shares.tolist(),
                bias=router.expert_bias.tolist(),
                load=load,
            )
        )
    return found


def test_shares_and_biases_are_those_of_the_last_step(ranks: Pool, dataset: Path) -> None:
    config = remembering(dataset, recompute="full")
    [steps] = ranks.run(steps_by_hand, 1, config, (False, True, False))
    before = [1 / 8] * 8
    bias = [0.0] * 8
    for number, step in enumerate(steps):
        expected = sum(
            8 * sum(share * score / tokens for share, score in zip(before, scores, strict=True))
            for scores, tokens in step.scores
        )
        *_, balance, packs = step.load
        assert (balance, packs) == (pytest.approx(expected, rel=1e-5), 6)
        taken, by_score = (np.array(counts).sum(0) for counts in (step.choices, step.by_score))
        if number != 1:  # a skipped step
            before = by_score / by_score.sum()
            bias = bias + 0.01 * np.sign(taken.mean() - taken)
        assert step.shares == pytest.approx(before, rel=1e-6)
        assert step.bias == pytest.approx(bias, rel=1e-6, abs=1e-8)
    assert any(not np.array_equal(step.choices, step.by_score) for step in steps)


def test_the_first_step_has_no_balance_loss(ranks: Pool, dataset: Path) -> None:
    with_loss, without = (
        ranks.run(train_curve, 1, remembering(dataset, router_z_loss=0.0, steps=2, **weights))[0]
        for weights in ({}, dict(balance_loss=0.0))
    )
    assert with_loss.grad_norms[0] == pytest.approx(without.grad_norms[0], rel=1e-6)
    assert with_loss.grad_norms[1] != pytest.approx(without.grad_norms[1], rel=1e-3)


def test_a_run_resumes_bit_for_bit(ranks: Pool, dataset: Path, tmp_path: Path) -> None:

    def job(save: Path) -> Config:
        made = expert_job(dataset, save, **Layout(expert=2, pipeline=2, data=2).settings)
        settings = dict(balance_over="global_batch", bias_update_rate=0.01)
        experts = dataclasses.replace(made.experts, **settings)
        return dataclasses.replace(made, architecture=EXPORTED, experts=experts)

    whole = resume_bit_for_bit(ranks, 4, job, tmp_path)
    assert len(set(whole["routers.1.shares"].tolist())) > 2
    assert whole[f"model.{BIAS}"].abs().max() > 0.01, "moved more than once"


def sorts(config: Config) -> int:
    """Train in this rank; return how often tokens are sorted again behind the exchange."""
    from megatron.core.transformer.moe import token_dispatcher

    plain = token_dispatcher.sort_chunks_by_idxs
    counted = []
    token_dispatcher.sort_chunks_by_idxs = lambda *given, **named: (
        counted.append(None) or plain(*given, **named)
    )
    try:
        train_curve(config)
    finally:
        token_dispatcher.sort_chunks_by_idxs = plain
    return len(counted)


def test_tokens_that_never_left_their_rank_are_sorted_once(ranks: Pool, dataset: Path) -> None:
    for expert in (1, 2):
        config = expert_config(dataset, steps=1, expert_model_parallel_size=expert)
        found = ranks.run(sorts, 2, config)
        assert all(bool(count) == (expert > 1) for count in found), found
