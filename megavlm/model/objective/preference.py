"""A chosen answer against a rejected one: direct preference optimization (DPO, arXiv 2305.18290),
alone or with two losses beside it (MPO, arXiv 2411.10442).

The probabilities that the frozen reference model gives the answers come with the batch, so that no
second model is in memory.

Shape letters: T tokens of the pack on this rank, N answers of the pack, two a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from megavlm.config.schema import Architecture
from megavlm.data.loading.batch import Batch
from megavlm.model.objective.losses import Losses, Reading
from megavlm.model.objective.next_token import NextToken
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Chunk


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model makes of the answers of a pack.

    Args:
        logprobs: logarithm of the probability of each answer, float32 [N].
        losses: mean cross-entropy of each answer's tokens, float32 [N].
        is_counted: whether an answer has a loss, bool [N].
    """

    logprobs: Tensor
    losses: Tensor
    is_counted: Tensor


class Preference(NextToken):
    """Losses of pairs of answers, behind the head over the vocabulary. Every token of a pair has
    the losses of the pair.

    Args:
        settings: megatron-core's configuration of the language model.
        architecture: the model.
        chunk: the last one has the losses.
        groups: process groups.

    Attributes:
        rewards: float64 [2]: sum over the pairs of the steps before, of all ranks, of the mean of
            both rewards, and number of the pairs. The one over the other is the shift that ``bco``
            compares rewards with.
    """

    def __init__(
        self, settings: TransformerConfig, architecture: Architecture, chunk: Chunk, groups: Groups
    ):
        super().__init__(settings, places_features=True)
        self.preference = architecture.preference
        self.has_losses = chunk.has_head
        self.groups = groups
        zeros = torch.zeros(2, dtype=torch.float64)
        self.register_buffer("rewards", zeros, persistent=False)
        self.register_buffer("_of_step", zeros.clone(), persistent=False)

    def answers(self, output: Tensor, batch: Batch) -> Answers:
        """Return what the model makes of each answer of a pack. Collective over the
        context-parallel ranks, which have parts of an answer.

        Args:
            output: losses of the tokens [T].
            batch: the pack.
        """
        places = batch.loss_positions
        losses = output[places].float()
        weights = batch.loss_weights[places]
        count = batch.samples
        of_answer = batch.preferences.answers[places] == torch.arange(
            count, device=places.device
        ).unsqueeze(1)
        is_learned = of_answer & (weights > 0)
        # A sum for each answer in a fixed order, which adding by index has not on a GPU.
        sums = torch.stack(
            [
                torch.where(is_learned, values, 0.0).sum(dim=1)
                for values in (losses, losses * weights, weights)
            ]
        )
        group = self.groups.collection.cp
        if group.size() > 1:
            # The losses of each rank depend on the parts of all: gradients are summed, too.
            sums = copy_to_tensor_model_parallel_region(sums, group=group)
            sums = reduce_from_tensor_model_parallel_region(sums, group=group)
        return Answers(logprobs=-sums[0], losses=sums[1], is_counted=sums[2].detach() > 0)

    def losses(self, output: Tensor, batch: Batch) -> Losses:
        """See ``Objective``."""
        answers = self.answers(output, batch)
        ratios = answers.logprobs.view(-1, 2) - batch.preferences.reference
        rewards = self.preference.beta * ratios
        is_counted = answers.is_counted.view(-1, 2).all(dim=1)
        shift = self._shift()
        chosen, rejected = rewards.unbind(dim=1)
        smoothing = self.preference.label_smoothing if self.training else 0.0
        margin = chosen - rejected
        named = {
            "dpo": -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin),
            "bco": -logsigmoid(chosen - shift) - logsigmoid(shift - rejected),
            "sft": answers.losses.view(-1, 2)[:, 0],
        }
        if self.training and torch.is_grad_enabled():
            self._of_step += torch.stack(_total(rewards.mean(dim=1), is_counted))
        return Losses.weighted(
            {name: self._of_tokens(losses, batch) for name, losses in named.items()},
            self.preference.weights,
            {
                "reward_chosen": _total(chosen, is_counted),
                "reward_rejected": _total(rejected, is_counted),
                "reward_accuracy": _total((margin > 0).float(), is_counted),
                "reward_shift": (shift, torch.ones_like(shift)),
            },
        )

    def _shift(self) -> Tensor:
        """Return the mean of the rewards before this step, float32; 0 before the first."""
        total, count = self.rewards
        return (total / count.clamp(min=1)).float()

    def _of_tokens(self, losses: Tensor, batch: Batch) -> Tensor:
        """Give each token of this rank [T] the loss of its pair [N / 2]; padding has none."""
        of_answers = pad(losses.repeat_interleave(2), (0, 1))
        return of_answers[batch.preferences.answers]

    def after_step(self, is_skipped: bool) -> None:
        """See ``Objective``: take the rewards of the step's answers, of all ranks."""
        if not self.has_losses:
            return
        found = self._of_step.clone()
        self._of_step.zero_()
        # Context-parallel ranks have the same pairs.
        dist.all_reduce(found, group=self.groups.collection.dp)
        if not is_skipped:
            self.rewards += found

    def state(self) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        return {"rewards": self.rewards} if self.has_losses else {}


def _total(values: Tensor, is_counted: Tensor) -> Reading:
    """Return the sum of some values of pairs, and their number."""
    return torch.where(is_counted, values.detach(), 0.0).sum().double(), is_counted.sum().double()
