"""Vision parallelism: context-parallel ranks divide the tiles of a pack; tensor-parallel ranks
divide either the layers of the vision encoder or the tiles too.

If each tensor-parallel rank holds whole layers (``--parallel.vision data``), it works on its own
tiles. Its parameters are replicas, as on data-parallel ranks, and their gradients are sums over all
tiles. But megatron-core assumes parameters that see the same data on every tensor-parallel rank.
This module handles the difference.

Shapes: I tiles of a rank, F features a tile, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megavlm.parallel.process_groups import Groups


def holds_whole_layers(groups: Groups) -> bool:
    """Return whether the vision encoder is replicated over the tensor-parallel ranks, each with its
    own tiles.
    """
    return groups.vision.tp.size() < groups.tensor_size


def gather_features(features: Tensor, groups: Groups) -> Tensor:
    """Gather the features of all tiles of a pack.

    Args:
        features: of this rank's tiles [I * F, 1, D].
        groups: the process groups.

    Returns:
        [ranks that share the tiles * I * F, 1, D], in the order of the tiles; the same on all of
            these ranks.
    """
    if holds_whole_layers(groups):
        # What follows is computed by all tensor-parallel ranks together, so that each of them knows
        # the whole gradient of every feature.
        features = gather_from_sequence_parallel_region(
            features, tensor_parallel_output_grad=False, group=groups.collection.tp
        )
    if groups.context_size > 1:
        # Each context-parallel rank knows the gradient from its own tokens only: they are summed.
        features = gather_from_sequence_parallel_region(
            features, tensor_parallel_output_grad=True, group=groups.collection.cp
        )
    return features


def gather_tiles(hidden: Tensor, groups: Groups) -> Tensor:
    """Gather the hidden states of all tiles of a pack, if tensor-parallel ranks divide the tiles.

    Args:
        hidden: of this rank's tiles [N, I, D], N tokens a tile.
        groups: the process groups.

    Returns:
        [N, tensor-parallel ranks * I, D]; what follows is computed by all of these ranks alike.
    """
    if not holds_whole_layers(groups):
        return hidden
    return gather_from_sequence_parallel_region(
        hidden.transpose(0, 1), tensor_parallel_output_grad=False, group=groups.collection.tp
    ).transpose(0, 1)


def mark_copies(module: nn.Module) -> None:
    """Mark replicated parameters, so that the gradient norm counts them once and not on every
    tensor-parallel rank.
    """
    # Read by megatron-core's ``param_is_not_tensor_parallel_duplicate``.
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False


def sum_gradients(parameters: Iterable[nn.Parameter], groups: Groups) -> None:
    """Sum the gradients of replicated parameters over the tensor-parallel ranks, after the sum over
    data-parallel ranks. Collective.
    """
    _sum([parameter.main_grad for parameter in parameters if parameter.requires_grad], groups)


def average_gradients(parameters: Iterable[nn.Parameter], groups: Groups) -> None:
    """Make the gradients of parameters, which all tensor-parallel ranks compute alike, the same to
    the last bit: kernels that add in any order would let the copies drift apart. Collective.

    megatron-core does so for parameters with ``average_gradients_across_tp_domain``, by a reduction
    that gloo lacks.
    """
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    if groups.tensor_size == 1 or not gradients:
        return
    _sum(gradients, groups)
    torch._foreach_div_(gradients, groups.tensor_size)


def _sum(gradients: Sequence[Tensor], groups: Groups) -> None:
    """Sum gradients over the tensor-parallel ranks, in place."""
    work = [
        dist.all_reduce(gradient, group=groups.collection.tp, async_op=True)
        for gradient in gradients
    ]
    for pending in work:
        pending.wait()


def save_once(entries: dict[str, Any], tensor_rank: int) -> dict[str, Any]:
    """Return checkpoint entries of which only the first tensor-parallel rank writes its replica."""
    return {
        key: dataclasses.replace(
            entry, replica_id=(entry.replica_id[0], tensor_rank, *entry.replica_id[2:])
        )
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        else entry
        for key, entry in entries.items()
    }
