"""A mixture of experts in the place of an MLP: megatron-core's ``MoELayer`` and its dispatchers,
with a router that knows the padding of packs, and experts with keys of their own in checkpoints.

Each expert is whole on its rank. Experts are split over the expert-parallel ranks; the other ranks
of a pipeline stage, tensor-parallel ones included, hold replicas (megatron-core's group
``expt_dp``).

Shape letters: T tokens of the pack on this rank, E experts, K experts of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn
from torch.nn.functional import linear


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

    The weights of a token's experts are their probabilities among all experts, divided by their sum
    unless ``config.moe_router_pre_softmax`` is set. ``config.moe_aux_loss_coeff`` and
    ``moe_z_loss_coeff`` are the weights that the losses of one pack have in a step; they are left
    out if the router is frozen.

    Attributes:
        load: float64 [E + 2]: how often each expert was chosen in training, on this rank and since
            it was last reset; the sum of the balance losses; and the number of packs that it is
            over. Summed over ranks, all of them are those of the whole packs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ):
        super().__init__(config, pg_collection, **kwargs)
        zeros = torch.zeros(config.num_moe_experts + 2, dtype=torch.float64)
        self.register_buffer("load", zeros, persistent=False)

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
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(self.topk)
        if not self.config.moe_router_pre_softmax:
            weights = weights / weights.sum(-1, keepdim=True)
        if padding_mask is None:
            is_real = torch.ones_like(chosen[:, :1], dtype=torch.bool)
        else:
            is_real = ~padding_mask.reshape(-1, 1)
        weights = torch.zeros_like(scores).scatter(1, chosen, weights * is_real)
        routed = torch.zeros_like(scores, dtype=torch.bool)
        routed = routed.scatter(1, chosen, is_real.expand_as(chosen))
        # Of layers that are computed again, the second pass alone has gradients.
        if self.training and torch.is_grad_enabled():
            weights = self._balanced(weights, logits, scores, routed, is_real)
        return weights, routed

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the router's logits [T, E] in float32, of hidden states [T, D]."""
        if self.config.moe_grouped_gemm:
            return self.gating(hidden)
        # megatron-core's ``router_gating_linear`` of 0.16.1 needs Transformer Engine.
        return linear(hidden.float(), self.weight.float())

    def _balanced(
        self, weights: Tensor, logits: Tensor, scores: Tensor, routed: Tensor, is_real: Tensor
    ) -> Tensor:
        """Count the load of the experts, and return the weights with the losses attached.

        Args:
            weights: [T, E]
            logits: of the router [T, E].
            scores: probabilities [T, E].
            routed: whether a token goes to an expert [T, E].
            is_real: [T, 1], false for padding.
        """
        # The pack is divided among context-parallel and tensor-parallel ranks.
        counts = torch.cat([routed.sum(0), is_real.sum()[None]]).float()
        own_counts = counts.clone()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        tokens = counts[-1].clamp(min=1)
        shares = counts[:-1] / (self.topk * tokens)
        balance = self.num_experts * (shares * (scores * is_real).sum(0) / tokens).sum()
        part = torch.full_like(counts[:1], 1 / self.tp_cp_group.size())
        self.load += torch.cat([own_counts[:-1], balance.detach()[None], part])
        balance_weight = self.config.moe_aux_loss_coeff
        z_weight = self.config.moe_z_loss_coeff or 0.0
        if not self.weight.requires_grad or not (balance_weight or z_weight):
            return weights
        loss = balance_weight * balance
        if z_weight:
            squares = logits.logsumexp(-1, keepdim=True).square()
            loss = loss + z_weight * (squares * is_real).sum() / tokens
        return _WithLoss.apply(weights, loss)


def count_routed_tokens(model: nn.Module) -> None:
    """Let the dispatchers of a model count the tokens that are routed.

    ``MoEAlltoAllTokenDispatcher.preprocess`` takes all tokens for routed, unless experts have a
    capacity; megatron-core 0.19 then permutes as many.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            dispatcher = layer.token_dispatcher
            if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
                plain = dispatcher.preprocess
                # Called by ``MoEAlltoAllTokenDispatcher.dispatch_preprocess``.
                dispatcher.preprocess = partial(_preprocess, dispatcher, plain)


def _preprocess(
    dispatcher: MoEAlltoAllTokenDispatcher, plain: Callable[[Tensor], Tensor], routed: Tensor
) -> Tensor:
    """Count the tokens of each expert, and all that are routed. The number travels to the host with
    the others, which the layer waits for anyway.
    """
    found = plain(routed)
    dispatcher.num_out_tokens = routed.sum()
    dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    return found


def mark_experts(experts: nn.Module) -> None:
    """Mark parameters as megatron-core looks for those of experts.

    ``DistributedDataParallel`` reduces the gradients of parameters without ``allreduce`` over the
    group ``expt_dp``, and ``param_is_not_tensor_parallel_duplicate`` counts those that are
    ``tensor_model_parallel`` on every rank: tensor-parallel ranks have other experts, or other
    shards of their optimizer state. Without expert parallelism its own layers would not say so.
    """
    for parameter in experts.parameters():
        parameter.allreduce = False
        parameter.tensor_model_parallel = True


def whole_experts_config(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of experts, which get their tokens from a dispatcher: nothing is
    gathered from the ranks of sequence parallelism.
    """
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


Weights = Iterator[tuple[int, str, str, Tensor]]
"""Of this rank's experts: number of the expert on this rank, name of the parameter, its key behind
the number of the expert, and the parameter.
"""


def expert_entries(
    prefix: str,
    weights: Weights,
    count: int,
    groups: ProcessGroupCollection,
) -> ShardedStateDict:
    """Describe the weights of this rank's experts, each under a key of its own.

    megatron-core's own version gives all experts of a layer one key.

    Args:
        prefix: of the experts' names.
        weights: of the experts.
        count: experts of this rank.
        groups: process groups.
    """
    first = groups.ep.rank() * count
    replica = (0, 0, groups.expt_dp.rank())
    return {
        f"{prefix}{name}": ShardedTensor.from_rank_offsets(
            f"{prefix}{first + number}.{key}", weight, replica_id=replica
        )
        for number, name, key, weight in weights
    }


def sequential_experts(submodules: MLPSubmodules) -> type:
    """Return experts that run one after the other, made of these linear layers."""

    def weights(experts: SequentialMLP) -> Weights:
        for number, expert in enumerate(experts.local_experts):
            for name, weight in expert.named_parameters():
                yield number, f"local_experts.{number}.{name}", name, weight

    return _experts(SequentialMLP, submodules, weights)


def grouped_experts(grouped: type, submodules: MLPSubmodules) -> type:
    """Return experts whose matrix products run in one kernel.

    Args:
        grouped: megatron-core's ``TEGroupedMLP``.
        submodules: grouped linear layers of Transformer Engine.
    """

    def weights(experts: nn.Module) -> Weights:
        named = dict(experts.named_parameters())
        for number in range(experts.num_local_experts):
            for linear_layer in ("linear_fc1", "linear_fc2"):
                name = f"{linear_layer}.weight{number}"
                yield number, name, f"{linear_layer}.weight", named[name]

    return _experts(grouped, submodules, weights)


def _experts(
    kind: type, submodules: MLPSubmodules, weights: Callable[[nn.Module], Weights]
) -> type:
    """Return experts of megatron-core's kind that are whole on their rank.

    Args:
        kind: megatron-core's class.
        submodules: its linear layers.
        weights: lists the weights of this rank's experts, see ``expert_entries``.
    """

    class Experts(kind):
        """Run the experts of this rank."""

        def __init__(
            self,
            count: int,
            config: TransformerConfig,
            pg_collection: ProcessGroupCollection,
            **kwargs: Any,
        ):
            settings = whole_experts_config(config)
            super().__init__(count, settings, submodules, pg_collection=pg_collection)
            self.groups = pg_collection
            mark_experts(self)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> ShardedStateDict:
            """Describe the weights; megatron-core calls this to save and load them."""
            return expert_entries(prefix, weights(self), self.num_local_experts, self.groups)

    return Experts


def routers_of(model: nn.Module) -> Iterator[PackRouter]:
    """Yield the routers of a chunk, in the order of its layers."""
    return (module for module in model.modules() if isinstance(module, PackRouter))
