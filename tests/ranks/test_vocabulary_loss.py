"""Head and loss a block of the vocabulary at a time: equal losses, gradients and updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megavlm.config.loss import Loss, loss_problems
from megavlm.config.schema import Config
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import build, config_for, make_packs, train_curve, whole_weights

BLOCK = Loss(vocabulary_block=48)
TENSOR = dict(tensor_model_parallel_size=2)
TIED = dict(tied_head=True)
CAPPED = dict(final_softcap=0.3)
LAYOUTS = {
    "alone": (1, dict(), dict()),
    "TP 2, tied": (2, TENSOR, TIED),
    "TP 2, SP, soft cap": (2, TENSOR | dict(sequence_parallel=True), CAPPED),
    "PP 2, tied, all tokens": (
        2,
        dict(pipeline_model_parallel_size=2, layout="v*3,t|t*2", head_tokens="all"),
        TIED,
    ),
    "TP 2, SP": (2, TENSOR | dict(sequence_parallel=True), dict()),
    "TP 2, SP, tied": (2, TENSOR | dict(sequence_parallel=True), TIED),
    "CP 2": (2, dict(context_parallel_size=2), CAPPED),
}
USUAL = list(LAYOUTS)[1:4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=8, image_share=0.6, alignment=4)
    return folder


def changed(config: Config, **settings: Any) -> Config:
    """Return a run with other settings of the language model."""
    language = dataclasses.replace(config.architecture.language, **settings)
    architecture = dataclasses.replace(config.architecture, language=language)
    return dataclasses.replace(config, architecture=architecture)


@pytest.mark.parametrize("name", LAYOUTS if asks_for_all() else USUAL)
def test_training_by_block_equals_training_with_whole_logits(
    ranks: Pool, dataset: Path, name: str
) -> None:
    world, layout, settings = LAYOUTS[name]
    config = changed(config_for(dataset, steps=3, **layout), **settings)
    plain = ranks.run(train_curve, world, config)
    blocks = ranks.run(train_curve, world, dataclasses.replace(config, loss=BLOCK))
    assert blocks[0].losses == pytest.approx(plain[0].losses, rel=1e-6)
    assert blocks[0].grad_norms == pytest.approx(plain[0].grad_norms, rel=1e-6)
    expected = whole_weights(plain)
    for key, weight in whole_weights(blocks).items():
        assert abs(weight - expected[key]).max() < 1e-5, key


def losses_and_gradients(config: Config, in_training: bool) -> tuple[torch.Tensor, ...]:
    """Return labels, hidden states, rows of the head, losses, and the gradients of both; the head
    is gathered from all ranks.
    """
    job = build(config)
    language = job.chunks[0].language.train(in_training)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(40, 1, 48, generator=generator).requires_grad_()
    labels = torch.randint(0, 199, (1, 40), generator=generator)
    head = language.output_layer.weight
    language.loss_positions = None
    language.ends_in_loss = True
    projected, _ = language.output_layer(hidden)
    losses = language.compute_language_model_loss(labels, projected)[0]
    weights = torch.linspace(0.5, 2.0, 40)
    of_hidden, of_head = torch.autograd.grad((losses * weights).sum(), (hidden, head))
    rows = [torch.empty_like(head) for _ in range(2 * job.groups.tensor_size)]
    for start, found in ((0, head.detach()), (job.groups.tensor_size, of_head)):
        parts = rows[start : start + job.groups.tensor_size]
        torch.distributed.all_gather(parts, found.contiguous(), group=job.groups.collection.tp)
    whole, gradient = (
        torch.cat(part)[:199] for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    )
    return labels[0], hidden.detach()[:, 0], whole, losses.detach(), of_hidden[:, 0], gradient


# A cap that most logits feel.
SMOOTHED = [(True, 0.3), (False, 0.0)]
SMOOTHED += [(True, 0.0), (False, 0.3)] if asks_for_all() else []


@pytest.mark.parametrize(("in_training", "softcap"), SMOOTHED)
def test_smoothing_and_z_loss_are_those_of_torch_and_of_the_paper(
    ranks: Pool, dataset: Path, in_training: bool, softcap: float
) -> None:
    loss = Loss(vocabulary_block=48, label_smoothing=0.1, z_loss=1e-2)
    for world in (1, 2):
        config = config_for(dataset, tensor_model_parallel_size=world)
        config = changed(config, final_softcap=softcap)
        config = dataclasses.replace(config, loss=loss)
        found, *_ = ranks.run(losses_and_gradients, world, config, in_training)
        labels, hidden, head, losses, of_hidden, of_head = found
        hidden.requires_grad_()
        head.requires_grad_()
        logits = hidden @ head.T
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        smoothing = 0.1 if in_training else 0.0
        wanted = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        wanted = wanted + (1e-2 if in_training else 0.0) * logits.logsumexp(1).square()
        torch.testing.assert_close(losses, wanted.detach(), rtol=1e-6, atol=1e-6)
        weighed = (wanted * torch.linspace(0.5, 2.0, 40)).sum()
        for gradient, right in zip(
            (of_hidden, of_head), torch.autograd.grad(weighed, (hidden, head)), strict=True
        ):
            torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(vocabulary_block=-1), "--loss.vocabulary_block -1: must be 0 or more"),
        (dict(label_smoothing=1.0), "--loss.label_smoothing 1.0: must be 0 or more, and less"),
        (dict(z_loss=float("nan")), "--loss.z_loss nan: must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, told: str) -> None:
    [problem] = loss_problems(Loss(**settings), "next_token", has_vocabulary=True)
    assert problem.startswith(told)
    [problem] = loss_problems(BLOCK, "contrastive", has_vocabulary=False)
    assert problem.startswith("--loss.vocabulary_block has no effect: --architecture.objective con")
