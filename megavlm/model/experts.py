"""Experts in the place of an MLP: the dispatchers of megatron-core's ``MoELayer``, and experts with
keys of their own in checkpoints. ``model/router`` chooses among them.

Experts are split over the expert-parallel ranks (``ep``), and each over the ranks that share
experts (``expt_tp``), if there are several; the other ranks of a pipeline stage, tensor-parallel
ones included, hold replicas (megatron-core's group ``expt_dp``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megavlm.config.lora import EXPERT_LINEARS
from megavlm.model.named_after import named_after


def prepare_dispatchers(model: nn.Module) -> None:
    """Let the dispatchers of a model count the tokens that are routed, keep nothing of a pass, and
    copy tokens no more than they must.

    ``MoEAlltoAllTokenDispatcher.preprocess`` takes all tokens for routed, unless experts have a
    capacity; megatron-core 0.19 then permutes as many. Behind the exchange between ranks it sorts
    tokens by expert again, which those of a single rank are already: it does not for one expert.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            dispatcher = layer.token_dispatcher
            layer.register_forward_hook(partial(_forget_pass, dispatcher))
            if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
                if dispatcher.ep_size * dispatcher.tp_size == 1:
                    dispatcher.num_local_experts = 1  # read where it sorts again, and nowhere else
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


def _forget_pass(dispatcher: MoETokenDispatcher, *unused: object) -> None:
    """Let go of tensors with a graph, which may hold the model; called by torch behind a layer."""
    kept = vars(dispatcher)
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.requires_grad:
            kept[name] = None


def mark_experts(experts: nn.Module) -> None:
    """Mark parameters as megatron-core looks for those of experts.

    ``DistributedDataParallel`` reduces the gradients of parameters without ``allreduce`` over the
    group ``expt_dp``, and ``param_is_not_tensor_parallel_duplicate`` counts those that are
    ``tensor_model_parallel`` on every rank: tensor-parallel ranks have other experts, or other
    shards of their weights or optimizer state. Without expert parallelism its own layers would not
    say so.
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


class ExpertRowLinear(RowParallelLinear):
    """The second linear layer of an expert that is whole on its rank: nothing is summed over ranks.

    megatron-core's would sum over a group of one rank at EP 1, and give a view of the result, to
    which ``MLP.forward`` cannot add a bias in place.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True  # read by ``RowParallelLinear.forward``


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
    own = groups.expt_tp.rank()
    shares = groups.expt_tp.size()
    entries: ShardedStateDict = {}
    for number, name, key, weight in weights:
        is_first = key.startswith("linear_fc1.")
        offsets = [(0 if is_first else 1, own, shares)] if shares > 1 else []
        whole_key = f"{prefix}{first + number}.{key}"
        entry = ShardedTensor.from_rank_offsets(whole_key, weight, *offsets, replica_id=replica)
        is_cut_twice = is_first and shares > 1
        entries[f"{prefix}{name}"] = (
            apply_swiglu_sharded_factory(entry, ()) if is_cut_twice else entry
        )
    return entries


def sequential_experts(submodules: MLPSubmodules) -> type:
    """Return experts that run one after the other, made of these linear layers."""

    def weights(experts: SequentialMLP) -> Weights:
        for number, expert in enumerate(experts.local_experts):
            for name, weight in expert.named_parameters():
                yield number, f"local_experts.{number}.{name}", name, weight

    return _experts(SequentialMLP, submodules, weights)


def mixture_spec(
    experts: type, shared: MLPSubmodules, router: Callable[..., nn.Module]
) -> ModuleSpec:
    """Describe router, experts, and the gated MLP that all tokens take, which ``MoELayer`` builds
    if the configuration has one.

    Args:
        experts: those of a layer that a rank holds.
        shared: what the shared expert is made of.
        router: makes a router.
    """
    submodules = MoESubmodules(
        experts=experts,
        router=router,
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
    )
    return ModuleSpec(module=MoELayer, submodules=submodules)


def grouped_experts(grouped: type, submodules: MLPSubmodules) -> type:
    """Return experts whose matrix products run in one kernel.

    Args:
        grouped: megatron-core's ``TEGroupedMLP``.
        submodules: grouped linear layers of Transformer Engine.
    """

    def weights(experts: nn.Module) -> Weights:
        named = dict(experts.named_parameters())
        for number in range(experts.num_local_experts):
            for layer in EXPERT_LINEARS:
                for kind in ("weight", "bias"):
                    name = f"{layer}.{kind}{number}"
                    if name in named:
                        yield number, name, f"{layer}.{kind}", named[name]
                for factor in ("a", "b"):
                    name = f"{layer}.lora.{number}.{factor}"
                    if name in named:
                        yield number, name, f"{layer}.lora.{factor}", named[name]

    return _experts(grouped, submodules, weights)


def _experts(
    kind: type, submodules: MLPSubmodules, weights: Callable[[nn.Module], Weights]
) -> type:
    """Return experts of megatron-core's kind.

    Args:
        kind: megatron-core's class.
        submodules: its linear layers.
        weights: lists the weights of this rank's experts, see ``expert_entries``.
    """

    @named_after(kind)
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
