"""The router of a mixture of experts: it knows the padding of packs, counts how busy experts are,
and has the losses that keep them equally busy.

Shape letters: T tokens of the pack on this rank, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.nn.functional import linear

from megavlm.config.schema import Experts, Language


class _WithLoss(torch.autograd.Function):
    """Pass a tensor on, and give a loss beside it the gradient 1."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, loss: Tensor) -> Tensor:
        """Return ``passed``."""
        ctx.save_for_backward(torch.ones_like(loss))
        return passed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both."""
        return gradient, *ctx.saved_tensors


class PackRouter(TopKRouter):
    """Choose the experts of each real token of a pack, and none for padding.

    The weights of a token's experts are their scores among all experts, divided by their sum unless
    ``config.moe_router_pre_softmax`` is set. ``config.moe_aux_loss_coeff`` and
    ``moe_z_loss_coeff`` are the weights that the losses of one pack have in a step; they are left
    out if the router is frozen.

    Args:
        config: of the language model.
        pg_collection: process groups.
        language: the language model.
        experts: the run's settings of experts.

    Attributes:
        load: float64 [E + 2]: how often each expert was chosen in training, on this rank and since
            it was last reset; the sum of the balance losses; and the number of packs that it is
            over. Summed over ranks, all of them are those of the whole packs.
        choices: float64 [2, E]: how often each expert was chosen in this step, on this rank; and
            how often it would have been without the bias, which is what the balance is of.
        shares: float32 [E]: share of the choices of the last step's global batch that fell on each
            expert. They begin even, and the balance loss then has no gradient.
        expert_bias: float32 [E], added to the scores for the choice alone; none: no bias.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        language: Language,
        experts: Experts,
        **kwargs: Any,
    ):
        super().__init__(config, pg_collection, **kwargs)
        count = config.num_moe_experts
        zeros = torch.zeros(count + 2, dtype=torch.float64)
        self.balances_steps = experts.balance_over == "global_batch"
        self.register_buffer("load", zeros, persistent=False)
        self.register_buffer("choices", zeros.new_zeros(2, count), persistent=False)
        self.register_buffer("shares", torch.full((count,), 1 / count), persistent=False)
        self.has_sigmoid = language.router_scores == "sigmoid"
        self.scaling = language.routed_scaling
        self.is_waiting = False
        self.bias_rate = experts.bias_update_rate if language.router_bias else 0.0
        if language.router_bias:
            del self.expert_bias  # none, of megatron-core, which updates its own at every step
            self.register_buffer("expert_bias", torch.zeros(count))

    @property
    def _is_trained(self) -> bool:
        """Whether a loss on the scores moves anything."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def looks_back(self) -> bool:
        """Whether a step depends on the choices of the one before it."""
        return (self.balances_steps or self.bias_rate > 0) and self._is_trained

    def remember(self, choices: Tensor) -> None:
        """Take the choices of a whole step [2, E], see ``choices``."""
        taken, by_score = choices
        self.shares.copy_(by_score / by_score.sum().clamp(min=1))
        if self.bias_rate:
            self.expert_bias += self.bias_rate * (taken.mean() - taken).sign().float()

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Route tokens; ``MoELayer.route`` calls this.

        Args:
            input: hidden states [T, 1, D].
            padding_mask: [T, 1], true for padding; none: all tokens are real.

        Returns:
            weights of the experts [T, E], float32; whether a token goes to an expert [T, E].
        """
        logits = self._logits(input.flatten(0, 1))
        scores = logits.sigmoid() if self.has_sigmoid else logits.softmax(-1)
        chosen = self.choose(self.ranking(scores))
        weights = scores.gather(1, chosen)
        if not self.config.moe_router_pre_softmax:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * self.scaling
        if padding_mask is None:
            is_real = torch.ones_like(chosen[:, :1], dtype=torch.bool)
        else:
            is_real = ~padding_mask.reshape(-1, 1)
        weights = torch.zeros_like(scores).scatter(1, chosen, weights * is_real)
        routed = _routed(scores, chosen, is_real)
        # Of layers that are computed again, the second pass alone has gradients.
        if self.training and torch.is_grad_enabled():
            by_score = routed
            if self.expert_bias is not None:
                by_score = _routed(scores, scores.topk(self.topk).indices, is_real)
            own = torch.stack([routed.sum(0), by_score.sum(0)])
            self.choices += own
            if self.has_sigmoid:
                scores = scores / scores.sum(-1, keepdim=True)
            weights = self._balanced(weights, logits, scores, own, is_real)
        return weights, routed

    def ranking(self, scores: Tensor) -> Tensor:
        """Return what the choice of experts goes by [T, E]: their scores, and the bias if any."""
        return scores if self.expert_bias is None else scores + self.expert_bias

    def choose(self, ranking: Tensor) -> Tensor:
        """Return the experts of each token [T, K], by what ``ranking`` gives [T, E]."""
        return ranking.topk(self.topk).indices

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the router's logits [T, E] in float32, of hidden states [T, D]."""
        if self.config.moe_grouped_gemm:
            return self.gating(hidden)
        # megatron-core's ``router_gating_linear`` of 0.16.1 needs Transformer Engine.
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), self.weight.float(), bias)

    def _balanced(
        self, weights: Tensor, logits: Tensor, scores: Tensor, own: Tensor, is_real: Tensor
    ) -> Tensor:
        """Count the load of the experts, and return the weights with the losses attached.

        Args:
            weights: [T, E]
            logits: of the router [T, E].
            scores: probabilities [T, E].
            own: this rank's choices [2, E], see ``choices``.
            is_real: [T, 1], false for padding.
        """
        # The pack is divided among context-parallel and tensor-parallel ranks.
        counts = torch.cat([own[1], is_real.sum()[None]]).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        tokens = counts[-1].clamp(min=1)
        shares = self.shares if self.balances_steps else counts[:-1] / (self.topk * tokens)
        balance = self.num_experts * (shares * (scores * is_real).sum(0) / tokens).sum()
        part = torch.full_like(counts[:1], 1 / self.tp_cp_group.size())
        self.load += torch.cat([own[0], balance.detach()[None], part])
        balance_weight = self.config.moe_aux_loss_coeff
        z_weight = self.config.moe_z_loss_coeff or 0.0
        if self.is_waiting or not self._is_trained or not (balance_weight or z_weight):
            return weights
        loss = balance_weight * balance
        if z_weight:
            squares = logits.logsumexp(-1, keepdim=True).square()
            loss = loss + z_weight * (squares * is_real).sum() / tokens
        return _WithLoss.apply(weights, loss)


def _routed(scores: Tensor, chosen: Tensor, is_real: Tensor) -> Tensor:
    """Return whether a token goes to an expert [T, E].

    Args:
        scores: [T, E]
        chosen: experts of each token [T, K].
        is_real: [T, 1], false for padding.
    """
    nowhere = torch.zeros_like(scores, dtype=torch.bool)
    return nowhere.scatter(1, chosen, is_real.expand_as(chosen))


def routers_of(model: nn.Module) -> Iterator[PackRouter]:
    """Yield the routers of a chunk, in the order of its layers."""
    return (module for module in model.modules() if isinstance(module, PackRouter))


def end_step(routers: Sequence[PackRouter], is_skipped: bool) -> None:
    """Take the choices that the routers of this rank's chunks made in a step, on all ranks of the
    pipeline stage, for the next step. Collective; nobody waits for the device.

    Args:
        routers: of this rank, in the order of its layers.
        is_skipped: whether the step changed no parameter; it then changes nothing here either.
    """
    counted = [router for router in routers if router.looks_back]
    if not counted:
        return
    choices = torch.stack([router.choices for router in counted])
    dist.all_reduce(choices, group=counted[0].tp_dp_cp_group)
    for router, of_step in zip(counted, choices, strict=True):
        router.choices.zero_()
        if not is_skipped:
            router.remember(of_step)
