"""A mixture of experts: training at every layout is that of one process, padding is routed nowhere,
and an expert may get no token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.lora import Lora
from megavlm.config.schema import Architecture, Config, Experts
from megavlm.data.loading.batch import BatchOptions
from megavlm.model.weights import fresh_tensor
from megavlm.planner.flops import pieces, training_cost
from tests.convert.models import EXPERTS
from tests.data.samples import make_dataset, make_sample, write_packs
from tests.ranks import layouts
from tests.ranks.layouts import LIMIT, MASKS, asks_for_all
from tests.ranks.model_checks import sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import (
    EVERYTHING,
    TINY,
    Curve,
    build,
    config_for,
    train_curve,
    whole_weights,
)
from tests.ranks.test_against_transformers import random_model
from tests.ranks.test_answers import CONTEXT, answers, configure
from tests.ranks.test_answers import folders as folders
from tests.ranks.test_cost import cost_of_zeros, counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_resume import LAST, forget_the_end, make_job, run_job, saved_tensors

# Four layers, so that a pipeline can have two chunks on each of two ranks.
MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=2),
    language=dataclasses.replace(
        TINY.language,
        **EXPERTS | dict(num_experts=8, experts_per_token=3, expert_ffn_hidden_size=24),
        num_layers=2,
    ),
)
# Heavy, so that a wrong gradient of them would show.
LOSSES = Experts(balance_loss=0.3, router_z_loss=0.02)


SHARED = dict(shared_expert_ffn_hidden_size=20, shared_expert_gate=True)
# Of the chunks of a pipeline, see ``MODEL``.
CUTS = {1: "auto", 2: "v*2,t|t", 4: "v|v|t|t"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(layouts.Layout):
    """A layout with experts.

    Args:
        expert: expert-parallel ranks.
        shared: ranks that share each expert.
        other: other settings.
    """

    expert: int = 1
    shared: int = 1
    other: tuple[tuple[str, Any], ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run."""
        return super().settings | dict(
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.shared,
            sequence_parallel=self.tensor > 1,
            layout=CUTS[self.pipeline * self.virtual],
            **dict(self.other),
        )

    def __str__(self) -> str:
        sizes = dict(
            EP=self.expert, ETP=self.shared, TP=self.tensor, PP=self.pipeline, CP=self.context
        )
        sizes |= dict(DP=self.data, V=self.virtual)
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join([*words, *(f"{name} {value}" for name, value in self.other)])


LAYOUTS = (
    Layout(data=2),
    Layout(expert=2, data=2),
    Layout(expert=2, data=2, other=(("dispatcher", "allgather"),), everyday=("2",)),
    Layout(expert=2, data=2, other=(("recompute", "full"),), everyday=("2",)),
    Layout(expert=2, data=2, other=(("recompute", "selective"),)),
    Layout(expert=2, data=2, other=(("overlap_grad_reduce", False),)),
    Layout(expert=2, data=2, other=(("overlap_param_gather", False),)),
    Layout(expert=4, data=4, everyday=("1.5",)),
    Layout(expert=2, data=4),
    Layout(tensor=2, everyday=("2",)),
    Layout(expert=2, tensor=2),
    Layout(expert=2, tensor=2, other=(("vision", "data"),)),
    Layout(expert=4, tensor=4),
    Layout(tensor=2, data=2),
    Layout(expert=2, tensor=2, data=2),
    Layout(expert=4, tensor=2, data=2, everyday=("2",)),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(expert=2, pipeline=2, data=2, everyday=("2",)),
    Layout(expert=2, pipeline=2, virtual=2, data=2),
    Layout(expert=2, pipeline=2, tensor=2),
    Layout(expert=4, pipeline=2, tensor=2, data=2),
    Layout(expert=2, pipeline=2, tensor=2, data=2),
    Layout(context=2),
    Layout(expert=2, context=2, everyday=("2",)),
    Layout(expert=4, context=2, data=2),
    Layout(expert=4, context=2, tensor=2),
    Layout(expert=2, context=2, tensor=2, pipeline=2),
    Layout(expert=2, context=2, pipeline=2, data=2),
    Layout(shared=2, data=2),
    Layout(shared=2, data=2, other=(("dispatcher", "allgather"),)),
    Layout(shared=2, tensor=2),
    Layout(shared=2, tensor=2, data=2),
    Layout(shared=4, data=4),
    Layout(expert=2, shared=2, data=4),
    Layout(expert=2, shared=2, tensor=2, data=2, everyday=("2",)),
    Layout(expert=2, shared=2, context=2, data=2, other=(("dispatcher", "allgather"),)),
    Layout(expert=2, shared=2, pipeline=2, tensor=2, data=2, other=(("recompute", "full"),)),
    Layout(shared=2, pipeline=2, virtual=2, data=2),
)
STEPS = 5 if asks_for_all() else 3
CASES = [
    (layout, mask)
    for layout in LAYOUTS
    for mask in MASKS
    if mask in layout.everyday or asks_for_all()
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_dataset(folder, packs=12, capacity=128, alignment=8, **sizes_of(MODEL))
    return folder


def expert_config(dataset: Path, architecture: Architecture = MODEL, **settings: Any) -> Config:
    experts = dataclasses.replace(
        LOSSES, **{name: settings.pop(name) for name in list(settings) if name in vars(LOSSES)}
    )
    config = config_for(dataset, adam_eps=1e-3, **settings)
    return dataclasses.replace(config, architecture=architecture, experts=experts)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[str], Curve]:
    return trained_alone(
        ranks, lambda mask: expert_config(dataset, trainable=MASKS[mask], steps=STEPS)
    )


def trained_alone(ranks: Pool, configured: Callable[[str], Config]) -> Callable[[str], Curve]:
    """Return a cached function that trains in one process, for a freeze mask."""
    return cache(lambda mask: ranks.run(train_curve, 1, configured(mask))[0])


def assert_trains_alike(ranks: Pool, layout: Layout, config: Config, alone: Curve) -> None:
    """Compare what a layout trains with what one process does."""
    found = compare(ranks.run(train_curve, layout.ranks, config), alone)
    assert alone.grad_norms[0] > 0 and max(found.values()) <= LIMIT, found


@pytest.mark.parametrize(("layout", "mask"), CASES, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Callable[[str], Curve], layout: Layout, mask: str
) -> None:
    config = expert_config(dataset, trainable=MASKS[mask], steps=STEPS, **layout.settings)
    assert_trains_alike(ranks, layout, config, alone(mask))


def test_bfloat16_trains_like_one_process_but_for_rounding(ranks: Pool, dataset: Path) -> None:
    settings = dict(precision="bfloat16", steps=3)
    [expected] = ranks.run(train_curve, 1, expert_config(dataset, **settings))
    layout = Layout(expert=2, tensor=2, data=2).settings
    found = ranks.run(train_curve, 4, expert_config(dataset, **settings, **layout))[0]
    assert found.losses == pytest.approx(expected.losses, rel=2e-2)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=5e-2)


def test_adapters_of_the_attention_train_like_one_process(ranks: Pool, dataset: Path) -> None:
    lora = Lora(rank=2, targets=("language.*.self_attention",))
    model = dataclasses.replace(MODEL, lora=lora)
    settings = dict(trainable=("language.*.lora", "connector"), steps=2)
    [expected] = ranks.run(train_curve, 1, expert_config(dataset, model, **settings))
    layout = Layout(expert=2, data=2).settings
    curves = ranks.run(train_curve, 2, expert_config(dataset, model, **settings, **layout))
    assert max(compare(curves, expected).values()) <= LIMIT


def expert_job(dataset: Path, save: Path, **settings: Any) -> Config:
    """Configure a job of six steps, with a checkpoint in the middle."""
    settings = dict(global_batch_size=4, drop_path=0.0, adam_eps=1e-3) | settings
    job = make_job(dataset, save, **settings)
    return dataclasses.replace(job, architecture=MODEL, experts=LOSSES)


def test_a_run_resumes_bit_for_bit_and_at_other_layouts(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    layout = Layout(expert=2, pipeline=2, data=2).settings
    ranks.run(run_job, 4, expert_job(dataset, tmp_path / "whole", **layout))
    [whole] = ranks.run(saved_tensors, 1, tmp_path / "whole" / LAST)
    experts = [key for key in whole if ".mlp.experts.7.linear_fc1.weight" in key]
    assert len(experts) == 2 * 4, "of two layers: weight, master weight, both moments"
    others = [Layout(), Layout(expert=2, tensor=2), Layout(shared=2, data=2), Layout(tensor=2)]
    others += [Layout(expert=2, shared=2, data=4), Layout(expert=4, data=4)]
    others = others if asks_for_all() else [Layout(expert=2, shared=2, data=4)]
    for number, other in enumerate([Layout(expert=2, pipeline=2, data=2), *others]):
        resumed = tmp_path / str(number)
        forget_the_end(tmp_path / "whole", resumed)
        ranks.run(run_job, other.ranks, expert_job(dataset, resumed, **other.settings))
        [found] = ranks.run(saved_tensors, 1, resumed / LAST)
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            if number == 0:
                assert np.array_equal(tensor, whole[key]), key
            np.testing.assert_allclose(
                tensor, whole[key], rtol=1e-4, atol=1e-5 * whole[key].abs().max(), err_msg=key
            )


def routed(config: Config) -> tuple[list[int], list[int], list[list[float]], list[list[float]]]:
    """Run the packs of a step; return the real tokens of each, the tokens that each expert ran on,
    the load of each layer's experts, and by hand the sum over the packs of each layer's loss.
    """
    import torch

    from megavlm.model.router import routers_of
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    batches = [job.train.batch(pack, 0, BatchOptions(vision_layers=2)) for pack in range(4)]
    ran: list[int] = []
    by_hand: list[list[float]] = []

    def count(module, inputs, output):
        ran.append(len(inputs[0]))

    def weigh(module, inputs, output):
        real = (~inputs[1]).flatten()
        logits = inputs[0].flatten(0, 1)[real] @ module.weight.T
        scores = logits.softmax(-1)
        chosen = torch.nn.functional.one_hot(scores.topk(3)[1], 8).sum((0, 1)) / (3 * real.sum())
        by_hand.append([module.layer_number, float(8 * (chosen * scores.mean(0)).sum())])
        weights, is_routed = output
        assert not is_routed[~real].any() and not weights[~real].any()
        torch.testing.assert_close(weights.sum(-1), real.float())

    for layer in job.chunks[0].language.decoder.layers:
        layer.mlp.router.register_forward_hook(weigh)
        for expert in layer.mlp.experts.local_experts:
            expert.register_forward_hook(count)
    run_packs(job.ddp_chunks, Microbatches(iter(batches), 4, 100.0), job.backend)
    real = [int((~batch.is_padding).sum()) for batch in batches]
    loads = [router.load.tolist() for router in routers_of(job.chunks[0])]
    sums = [sum(loss for number, loss in by_hand if number == layer) for layer in (1, 2)]
    return real, ran, loads, sums


def test_padding_is_routed_nowhere_and_counts_in_no_loss(ranks: Pool, dataset: Path) -> None:
    [(real, ran, loads, by_hand)] = ranks.run(routed, 1, expert_config(dataset))
    assert all(0 < count < 128 for count in real), "packs end in padding"
    assert sum(ran) == 2 * 3 * sum(real), "two layers, three experts of a token"
    for (*choices, balance, packs), expected in zip(loads, by_hand, strict=True):
        assert sum(choices) == 3 * sum(real) and packs == 4
        assert balance == pytest.approx(expected, rel=1e-5)


def train_with_shut_experts(config: Config) -> Curve:
    """Train with routers that like all experts alike, so that the same ones are chosen always."""
    from megavlm.model.router import routers_of
    from tests.ranks import runs

    plain = runs.build

    def build_shut(config: Config) -> Any:
        job = plain(config)
        for chunk in job.chunks:
            for router in routers_of(chunk):
                router.weight.data.zero_()
        return job

    runs.build = build_shut
    try:
        return train_curve(config)
    finally:
        runs.build = plain


def test_experts_without_a_token_neither_hang_nor_change_anything(
    ranks: Pool, dataset: Path
) -> None:
    """Of two expert-parallel ranks one then has no token at all."""
    mask = ("vision", "language.decoder.layers.*.mlp.experts")
    settings = dict(trainable=mask, steps=3, weight_decay=0.0)
    [expected] = ranks.run(train_with_shut_experts, 1, expert_config(dataset, **settings))
    layout = Layout(expert=2, data=2).settings
    curves = ranks.run(train_with_shut_experts, 2, expert_config(dataset, **settings, **layout))
    assert max(compare(curves, expected).values()) <= LIMIT
    key = "language.decoder.layers.1.mlp.experts.{}.linear_fc2.weight"
    fresh = fresh_tensor(expert_config(dataset))
    weights = whole_weights([expected])
    changed = [
        not np.array_equal(weights[key.format(expert)], fresh(key.format(expert), (48, 24)))
        for expert in range(8)
    ]
    assert sum(changed) == 3


def test_the_losses_of_the_router_have_gradients(ranks: Pool, dataset: Path) -> None:
    norms = [
        ranks.run(train_curve, 1, expert_config(dataset, steps=1, **weights))[0].grad_norms[0]
        for weights in (
            dict(balance_loss=0.0, router_z_loss=0.0),
            dict(balance_loss=0.0),
            dict(router_z_loss=0.0),
        )
    ]
    assert len({round(norm, 4) for norm in norms}) == 3


def test_a_router_that_is_still_frozen_trains_nothing_before_it(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    norms = []
    for name, losses in (("with", LOSSES), ("without", Experts(balance_loss=0.0))):
        job = expert_job(dataset, tmp_path / name, frozen_until=("language=2",), save_interval=0)
        ranks.run(run_job, 1, dataclasses.replace(job, experts=losses))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        norms.append([line["grad_norm"] for line in lines if "grad_norm" in line])
    assert norms[0][:2] == norms[1][:2] and norms[0][2] != norms[1][2]


@pytest.mark.parametrize("shared", [{}, SHARED])
def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path, shared: dict[str, Any]) -> None:
    # As many words as rows of the padded vocabulary, and a full pack: padding does not count.
    language = dataclasses.replace(MODEL.language, vocab_size=256, **shared)
    model = dataclasses.replace(MODEL, language=language)
    sizes = sizes_of(model)
    text = dict(text_tokens=128 - model.features_per_tile, grids=((1, 1),), line=1)
    sample = make_sample(np.random.default_rng(0), images=1, **text, **sizes)
    write_packs(tmp_path, [[sample]], capacity=128, **sizes)
    adapted = dataclasses.replace(model, lora=Lora(rank=2, targets=("language.*.experts",)))
    cases = ((("connector",), model), (EVERYTHING, model), (("language.*.lora",), adapted))
    for mask, model in cases:
        [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, mask, model)
        size["squared_lengths"] *= 2  # torch counts all pairs of tokens
        zeros = cost_of_zeros(model, mask, size)
        assert training_cost(model, mask).total(**size) + zeros == counted
        assert {piece.key for piece in pieces(model)} - {""} == keys


def valid_loss(config: Config) -> float:
    """Compute the loss over three packs, of which four data-parallel ranks cannot all have one."""
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.train.evaluate import held_out_loss

    job = dataclasses.replace(build(config), valid=PackedDataset(config.data.train))
    return held_out_loss(job)[0]


def test_ranks_without_packs_run_along_in_validation_and_answers(
    ranks: Pool, dataset: Path, folders: Path, tmp_path: Path
) -> None:
    layout = Layout(expert=4, data=4).settings
    configs = [expert_config(dataset, eval_packs=3, **one) for one in ({}, layout)]
    [expected], found = (ranks.run(valid_loss, n, one) for n, one in zip((1, 4), configs))
    assert found == pytest.approx([expected] * 4, rel=1e-6)

    language = dataclasses.replace(MODEL.language, vocab_size=457)
    model = dataclasses.replace(MODEL, language=language)
    random_model(model, CONTEXT, tmp_path)
    [alone], four = (
        ranks.run(
            answers, n, dataclasses.replace(configure(folders, **one), architecture=model), tmp_path
        )
        for n, one in ((1, {}), (4, layout))
    )
    assert all(one == alone for one in four) and any(alone[0])
