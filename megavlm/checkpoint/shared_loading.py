"""Reads a distributed checkpoint with ranks that are replicas of each other: each reads a share of
what all of them need, and sends it to the others.

megatron-core lets every rank read all that it needs itself, so that what is read of the storage
grows with the number of replicas: the weights of 8 billion parameters are 16 GB, which 1,024
data-parallel ranks would read 1,024 times.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.checkpoint.rank_errors import RankError

OWNED = ("optimizer", "ema")
"""First keys, in what is saved and loaded, of tensors that one of the replicas has for all."""
_OF_EXPERTS = ".mlp.experts."


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Ranks that need the same shards.

    Args:
        dense: of all but experts; this rank is one of them.
        experts: of experts.
    """

    dense: dist.ProcessGroup
    experts: dist.ProcessGroup

    @classmethod
    def of(cls, collection: ProcessGroupCollection) -> Self:
        """Return which ranks hold the same weights as this one."""
        return cls(dense=collection.dp_cp, experts=collection.expt_dp)

    def divide(
        self, entries: Sequence[ShardedTensor | ShardedTensorFactory]
    ) -> list[tuple[int, dist.ProcessGroup]]:
        """Divide weights, which all replicas have in the same order, by their bytes.

        Returns:
            The owner of each weight, and the ranks that have it.
        """
        divided: dict[int, tuple[int, dist.ProcessGroup]] = {}
        for group, of_experts in ((self.dense, False), (self.experts, True)):
            own = [one for one in entries if is_of_experts(one.key) == of_experts]
            owners = spread([one.data.nbytes for one in own], group.size())
            divided |= {id(one): (owner, group) for one, owner in zip(own, owners, strict=True)}
        return [divided[id(one)] for one in entries]


def is_of_experts(key: str) -> bool:
    """Return whether a checkpoint key is that of an expert's weight."""
    return _OF_EXPERTS in key


class SharedLoading(TorchDistLoadShardedStrategy):
    """Loads shards; ``dist_checkpointing.load`` calls ``load`` on every rank.

    Args:
        replicas: of this rank.
    """

    def __init__(self, replicas: Replicas):
        super().__init__()
        self._replicas = replicas

    @torch.no_grad()
    def load(
        self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, *options: Any
    ) -> dict[Any, Any]:
        """Return the state dict with tensors in the place of shards. Collective.

        Raises:
            RankError: a rank cannot read its share; every rank raises it.
        """
        entries = [one for one in nested_values(sharded_state_dict) if isinstance(one, ShardedBase)]
        common = {name: value for name, value in sharded_state_dict.items() if name not in OWNED}
        shards = [one for one in nested_values(common) if isinstance(one, ShardedTensor)]
        kinds = (
            ([one for one in shards if not is_of_experts(one.key)], self._replicas.dense),
            ([one for one in shards if is_of_experts(one.key)], self._replicas.experts),
        )
        plans = [
            (shard, owner, group)
            for kind, group in kinds
            for shard, owner in zip(kind, _owners(kind, group))  # nothing to share, no owners
        ]
        others = {id(shard) for shard, owner, group in plans if owner != group.rank()}
        own = {str(number): one for number, one in enumerate(entries) if id(one) not in others}
        failures: dict[int, str] = {}
        try:
            read = super().load(own, checkpoint_dir, *options)
        except CheckpointException as error:  # which is no Exception
            failures = {rank: str(found) for rank, (found, _) in error.failures.items()}
        if told := _failures_of_all(failures):
            raise RankError(f"{checkpoint_dir}: cannot be loaded: {told}")
        values = {id(one): read[number] for number, one in own.items()}
        for shard, owner, group in plans:
            if shard.data is None:
                shard.init_data("cpu")
            send(values.setdefault(id(shard), shard.data.detach()), owner, group)
        return dict_list_map_inplace(lambda one: values.get(id(one), one), sharded_state_dict)


def _failures_of_all(failures: dict[int, str]) -> str:
    """Return what ranks could not read, in words; empty if each read its share. Collective.

    Args:
        failures: as torch tells them: with megatron-core 0.16 those of all ranks on each of them;
            with 0.19, where each rank reads by itself, its own, under another number.
    """
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, failures)
    if any(found != every[0] for found in every):
        every = [{rank: "; ".join(found.values())} for rank, found in enumerate(every) if found]
    told = {rank: text for found in every for rank, text in found.items()}
    return "; ".join(f"rank {rank}: {text}" for rank, text in told.items())


def _owners(shards: Sequence[ShardedTensor], group: dist.ProcessGroup) -> list[int]:
    """Return which rank of a group reads each shard; none if each rank reads its own, since they do
    not need the same. Collective over the group.
    """
    if group.size() == 1 or not _is_common(shards, group):
        return []
    sizes = [one.dtype.itemsize * torch.Size(one.local_shape).numel() for one in shards]
    return spread(sizes, group.size())


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """Divide tensors among ranks so that all have about as much; a pure function.

    Args:
        sizes: of each tensor.
        ranks: their number.

    Returns:
        The rank of each tensor.
    """
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        load, rank = heapq.heappop(loads)
        owners[number] = rank
        heapq.heappush(loads, (load + sizes[number], rank))
    return owners


def _is_common(shards: Sequence[ShardedTensor], group: dist.ProcessGroup) -> bool:
    """Tell whether all ranks of a group need the same shards in the same order. Collective."""
    said = repr(
        [(one.key, tuple(one.global_offset), tuple(one.local_shape), one.dtype) for one in shards]
    )
    number = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "little")
    both = torch.tensor([number, -number], device=_device(group))
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    most, negated_least = both.tolist()
    return most == -negated_least


def send(tensor: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Give all ranks of a group the values that one of them has read, as bytes. Collective; one
    tensor at a time is on the device.

    Args:
        tensor: the values, or room for them.
        owner: the rank of the group that has them.
        group: the ranks.
    """
    if group.size() == 1:
        return
    moved = tensor.to(_device(group)).contiguous()
    dist.broadcast(moved.view(-1).view(torch.uint8), group_src=owner, group=group)
    if moved is not tensor:
        tensor.copy_(moved)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return where tensors are that a group exchanges."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
