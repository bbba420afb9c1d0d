"""How ranks share the vision encoder: the tiles of a pack over context-parallel ranks, and over
tensor-parallel ranks either the layers or the tiles too.

Where each tensor-parallel rank holds whole layers (``--parallel.vision data``), it works on tiles
of its own. Its weights are copies of the other ranks', like those of data-parallel ranks, and their
gradients are sums over all tiles; but megatron-core takes them for weights that see the same data
on every tensor-parallel rank. What follows from the difference stands here.

Shapes: I tiles of a rank, F features a tile, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megavlm.parallel.process_groups import Groups


def holds_whole_layers(groups: Groups) -> bool:
    """Whether several tensor-parallel ranks hold the same weights of the vision encoder, each for
    tiles of its own.
    """
    return groups.vision.tp.size() < groups.tensor_size


def gather_features(features: Tensor, groups: Groups) -> Tensor:
    """Bring the features of all tiles of a pack together.

    Args:
        features: of this rank's tiles [I * F, 1, D].
        groups: this rank's place.

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


def mark_copies(module: nn.Module) -> None:
    """Let the gradient's norm count the weights of a module once, not on every tensor-parallel
    rank.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False


def sum_gradients(parameters: Iterable[nn.Parameter], groups: Groups) -> None:
    """Sum the gradients of copies of weights over the tensor-parallel ranks, after data-parallel
    ranks have done so. Collective.
    """
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    work = [
        dist.all_reduce(gradient, group=groups.collection.tp, async_op=True)
        for gradient in gradients
    ]
    for pending in work:
        pending.wait()


def save_once(entries: dict[str, Any], tensor_rank: int) -> dict[str, Any]:
    """Entries of a checkpoint such that of all tensor-parallel ranks, which hold the same weights,
    the first one writes them.
    """
    return {
        key: dataclasses.replace(
            entry, replica_id=(entry.replica_id[0], tensor_rank, *entry.replica_id[2:])
        )
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        else entry
        for key, entry in entries.items()
    }
