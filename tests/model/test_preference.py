"""Losses of preferences from the probabilities of answers: those of TRL, as InternVL trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megavlm.config.preference import Preference as Settings
from megavlm.config.schema import Parallel
from megavlm.data.loading.batch import Batch, BatchOptions, Preferences
from megavlm.data.loading.dataset import PackedDataset
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.preference import Preference
from megavlm.parallel import backend, process_groups
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Chunk
from tests.data.preference_packs import make_preferences
from tests.ranks.runs import TINY

# Of TRL 0.10.1, the version that InternVL's MPO was made with: DPOTrainer.dpo_loss with beta 0.1,
# given these logarithms of probabilities. The running mean of the rewards, which it updates before
# the loss, was (0.05 - 0.075 - 0.025 + 0.15 + 0.15 - 0.15) / 6 = 1 / 60.
CHOSEN = [-12.5, -3.25, -40.0]
REJECTED = [-14.0, -2.5, -36.5]
REFERENCE = [[-13.0, -13.25], [-3.0, -4.0], [-41.5, -35.0]]
TRL = {
    "dpo": [0.632599056, 0.784470439, 0.554355204],
    "bco": [1.324983239, 1.476231933, 1.241983175],
}
TRL_SMOOTHED = [0.645099044, 0.766970456, 0.584355175]
SHIFT = 1 / 60


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_preferences(folder, packs=1, pairs=3)
    options = BatchOptions(reduction="sample", with_preferences=True)
    batch = PackedDataset(folder).batch(0, 0, options)
    given = Preferences(answers=batch.preferences.answers, reference=torch.tensor(REFERENCE))
    return dataclasses.replace(batch, preferences=given)


def output_of(batch: Batch) -> torch.Tensor:
    """Return losses of tokens that add up to the given probabilities of the answers, and others
    where nothing is learned.
    """
    output = torch.full((len(batch.tokens),), 7.0)
    for answer, logprob in enumerate(np.array([CHOSEN, REJECTED]).T.ravel()):
        places = (batch.preferences.answers == answer) & (batch.loss_weights > 0)
        parts = torch.rand(int(places.sum()))
        output[places] = (-logprob * parts / parts.sum()).float()
    return output.requires_grad_()


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    backend.start(5)
    yield process_groups.create(Parallel(), 0)
    process_groups.destroy()


def make(groups: Groups, **settings: float) -> Preference:
    chunk = Chunk(
        vision_layers=range(1),
        language_layers=range(1),
        has_patch_embedding=True,
        has_connector=True,
        has_head=True,
    )
    plain = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    architecture = dataclasses.replace(TINY, preference=Settings(**settings))
    return Preference(plain, architecture, chunk, groups)


def of_pairs(losses: Losses, name: str, batch: Batch) -> list[float]:
    """Return a loss of each pair, which all tokens of both answers have."""
    found = []
    for pair in range(3):
        own = losses.named[name][batch.preferences.answers // 2 == pair]
        assert (own == own[0]).all()
        found.append(own[0].item())
    return found


def test_losses_and_rewards_are_those_of_trl(groups: Groups, batch: Batch) -> None:
    objective = make(groups)
    objective.rewards.copy_(torch.tensor([SHIFT * 4, 4.0]))
    losses = objective.losses(output_of(batch), batch)
    for name, expected in TRL.items():
        assert of_pairs(losses, name, batch) == pytest.approx(expected, rel=1e-6)
    tokens = [
        int(((batch.preferences.answers == 2 * pair) & (batch.loss_weights > 0)).sum())
        for pair in range(3)
    ]
    means = [-logprob / count for logprob, count in zip(CHOSEN, tokens, strict=True)]
    assert of_pairs(losses, "sft", batch) == pytest.approx(means, rel=1e-6)
    # The loss of the pack: the mean over its pairs of 0.8 DPO + 0.2 BCO + SFT.
    total = (losses.total * batch.loss_weights).sum().item() / batch.weight_sum
    expected = np.mean(
        [0.8 * dpo + 0.2 * bco + sft for dpo, bco, sft in zip(*TRL.values(), means, strict=True)]
    )
    assert total == pytest.approx(expected, rel=1e-6)
    readings = {name: (a / b).item() for name, (a, b) in losses.readings.items()}
    assert readings == pytest.approx(
        dict(
            reward_chosen=(0.05 - 0.025 + 0.15) / 3,
            reward_rejected=(-0.075 + 0.15 - 0.15) / 3,
            reward_accuracy=2 / 3,
            reward_shift=SHIFT,
        ),
        rel=1e-5,
    )


def test_padding_has_no_loss_and_unlearned_tokens_no_gradient(groups: Groups, batch: Batch) -> None:
    objective = make(groups)
    output = output_of(batch)
    losses = objective.losses(output, batch)
    assert not losses.total[batch.is_padding].any()
    (losses.total * batch.loss_weights).sum().backward()
    assert torch.equal(output.grad != 0, batch.loss_weights > 0)


def test_labels_are_smoothed_in_training_alone(groups: Groups, batch: Batch) -> None:
    objective = make(groups, label_smoothing=0.1)
    losses = objective.losses(output_of(batch), batch)
    assert of_pairs(losses, "dpo", batch) == pytest.approx(TRL_SMOOTHED, rel=1e-6)
    losses = objective.eval().losses(output_of(batch), batch)
    assert of_pairs(losses, "dpo", batch) == pytest.approx(TRL["dpo"], rel=1e-6)


def test_the_shift_is_the_mean_reward_of_the_steps_before(groups: Groups, batch: Batch) -> None:
    objective = make(groups)

    def shift() -> float:
        return objective.losses(output_of(batch), batch).readings["reward_shift"][0].item()

    assert shift() == 0
    objective.after_step(is_skipped=True)
    assert shift() == 0  # a step that was skipped does not count
    objective.after_step(is_skipped=False)
    assert shift() == pytest.approx(SHIFT, rel=1e-5)
    objective.eval()
    objective.losses(output_of(batch), batch)  # nor do held-out pairs
    objective.after_step(is_skipped=False)
    assert objective.rewards.tolist() == pytest.approx([6 * SHIFT, 6], rel=1e-5)
    assert objective.state()["rewards"] is objective.rewards


def test_a_pack_without_a_loss_counts_nothing(groups: Groups, batch: Batch) -> None:
    objective = make(groups)
    blank = dataclasses.replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))
    readings = objective.losses(output_of(batch), blank).readings
    counted = {name: count.item() for name, (_, count) in readings.items()}
    assert counted.pop("reward_shift") == 1 and not any(counted.values())
    assert not objective._of_step.any()
