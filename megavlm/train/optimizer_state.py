"""The optimizer's state as whole tensors, which checkpoints hold so that any layout can load them.

megatron-core shares the state out over the data-parallel ranks in flat buffers, which are cut
anywhere. To save, it makes every one of these ranks gather all of it in the memory of its host, and
to load, read all of it: master weights and moments of 8 billion parameters are 96 GB, eight times
on a node of eight ranks. Here each tensor is whole on one of the ranks alone, its owner, who writes
or reads it. Keys and values in the file are those of megatron-core's ``fully_reshardable`` format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megavlm.checkpoint.shared_loading import spread

MASTER = "param"
_STATE = "optimizer.state."
_TENSORS = (MASTER, "exp_avg", "exp_avg_sq")
# Values that ranks exchange at a time: 64 MiB on the device.
_PIECE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter is in the buffers of an optimizer, as all its ranks know it.

    Args:
        number: of the parameter, as megatron-core counts them.
        parameter: of the model.
        buffer, bucket: numbers of the buffer, and of the bucket in it.
        start, end: elements of the bucket.
        owner: rank of the data-parallel group that has its state as a whole.
    """

    number: int
    parameter: nn.Parameter
    buffer: int
    bucket: int
    start: int
    end: int
    owner: int

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        return self.end - self.start


def optimizer_parts(state: Mapping[Any, Any], optimizer: MegatronOptimizer) -> list[dict]:
    """Return the states of the optimizers that megatron-core chains, for experts and for all else;
    without experts there is one.

    Args:
        state: the optimizer's part of what is saved or loaded.
        optimizer: whose it is.
    """
    count = len(optimizer.chained_optimizers)
    return [state] if count == 1 else [state.get(number, {}) for number in range(count)]


def join_parts(parts: Sequence[Mapping]) -> Any:
    """Return the state of an optimizer from what ``optimizer_parts`` returned."""
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def weight_of_master(entry: ShardedBase) -> str:
    """Return the checkpoint key of the weight that an entry is the master weight of."""
    return entry.key.rpartition(f"{_STATE}{MASTER}.")[2]


def own_whole_tensors(part: DistributedOptimizer) -> None:
    """Let an optimizer save and load whole tensors by their owners; its ``sharded_state_dict`` and
    ``load_state_dict`` call these two, and become collective.
    """
    part.sharded_param_state_fully_reshardable = partial(_param_state, part)
    part.load_parameter_state_from_fully_reshardable = partial(_load_param_state, part)


def sharded(
    part: DistributedOptimizer,
    weights: ShardedStateDict,
    names: Sequence[str] = _TENSORS,
    *,
    is_loading: bool = False,
) -> dict[int, dict[str, ShardedBase]]:
    """Return the state of the parameters that this rank owns, by number of the parameter, as
    megatron-core saves and loads it. Collective unless ``is_loading``.

    Args:
        part: the optimizer.
        weights: the model's part of what is saved or loaded.
        names: of the tensors, master weights or moments.
        is_loading: leave room for the values instead of gathering them.
    """
    entries = {
        id(entry.data): entry
        for entry in nested_values(weights)
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    }
    own = [one for one in places(part) if one.owner == part.data_parallel_group.rank()]
    whole = {} if is_loading else _gather(part, own, names)
    state: dict[int, dict[str, ShardedBase]] = {}
    for one in own:
        entry = entries[id(one.parameter)]
        dtype = {"dtype": torch.float32} if isinstance(entry, ShardedTensor) else {}
        room = whole[one.number] if whole else {name: torch.empty(one.size) for name in names}
        state[one.number] = {
            name: replace(
                entry,
                key=f"{_STATE}{name}.{entry.key}",
                data=room[name].view(entry.data.shape),
                # The first of the replicas writes, which is the owner.
                replica_id=(*entry.replica_id[:2], 0),
                **dtype,
            )
            for name in names
        }
    return state


def places(part: DistributedOptimizer) -> list[Place]:
    """List the parameters of an optimizer with their owners, who have about as much each; the same
    on each of its ranks.
    """
    found = [
        (buffer, bucket, parameter, start, end)
        for buffer, one in enumerate(part.buffers)
        for parameter, (start, end, bucket) in one.param_index_map.items()
    ]
    owners = spread([end - start for *_, start, end in found], part.data_parallel_group.size())
    listed = []
    for number, (buffer, bucket, parameter, start, end) in enumerate(found):
        offset = part.buffers[buffer].buckets[bucket].offset
        listed.append(
            Place(
                number=number,
                parameter=parameter,
                buffer=buffer,
                bucket=bucket,
                start=start - offset,
                end=end - offset,
                owner=owners[number],
            )
        )
    return listed


def scatter(
    part: DistributedOptimizer, state: Mapping[int, Mapping[str, Tensor]], names: Sequence[str]
) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """Give each rank its shards of whole tensors, on the device. Collective.

    Args:
        part: the optimizer.
        state: the tensors of the parameters that this rank owns, by number of the parameter.
        names: of the tensors.

    Yields:
        Each parameter of which this rank has a shard, and the shards by name, flat.
    """
    group = part.data_parallel_group
    for one in places(part):
        shard = _shard_of(part, one)
        device = part.buffers[one.buffer].grad_data.device
        tensors = {name: torch.empty(len(shard), device=device) for name in names}
        for name in names:
            whole = state[one.number][name].flatten() if one.owner == group.rank() else None
            for start in range(0, one.size, _PIECE):
                end = min(start + _PIECE, one.size)
                piece = (
                    torch.empty(end - start, device=device)
                    if whole is None
                    else whole[start:end].to(device)
                )
                dist.broadcast(piece, group_src=one.owner, group=group)
                _copy(piece, start, tensors[name], shard.start)
        if len(shard):
            yield one.parameter, tensors


def master_of(part: DistributedOptimizer, parameter: nn.Parameter) -> Tensor:
    """Return this rank's shard of the master weights of a parameter of which it has one."""
    group, place = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][place]


def _param_state(
    part: DistributedOptimizer,
    weights: ShardedStateDict,
    is_loading: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> dict[int, dict[str, ShardedBase]]:
    """Take the place of megatron-core's ``sharded_param_state_fully_reshardable``."""
    return sharded(part, weights, is_loading=is_loading)


def _load_param_state(
    part: DistributedOptimizer, state: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Take the place of megatron-core's ``load_parameter_state_from_fully_reshardable``."""
    for parameter, tensors in scatter(part, state, _TENSORS):
        part._set_main_param_and_optimizer_states(parameter, tensors)


def _ranges(part: DistributedOptimizer, buffer: int, bucket: int) -> Mapping[nn.Parameter, Any]:
    """Return megatron-core's ranges of the parameters of which this rank has a shard in a
    bucket.
    """
    [buckets] = part.gbuf_ranges[buffer].values()
    return buckets[bucket]["param_map"]


def _shard_of(part: DistributedOptimizer, one: Place) -> range:
    """Return which elements of a parameter are this rank's."""
    found = _ranges(part, one.buffer, one.bucket).get(one.parameter)
    return range(0) if found is None else range(found["param"].start, found["param"].end)


def _gather(
    part: DistributedOptimizer, own: Sequence[Place], names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Return whole tensors of the parameters ``own``, flat, in float32 on the host, by number of
    the parameter. Collective.
    """
    whole = {one.number: {name: torch.empty(one.size) for name in names} for one in own}
    for number, buffer in enumerate(part.buffers):
        for bucket in range(len(buffer.buckets)):
            here = [one for one in own if (one.buffer, one.bucket) == (number, bucket)]
            _gather_bucket(part, number, bucket, {one: whole[one.number] for one in here}, names)
    return whole


def _gather_bucket(
    part: DistributedOptimizer,
    buffer: int,
    bucket: int,
    wanted: Mapping[Place, Mapping[str, Tensor]],
    names: Sequence[str],
) -> None:
    """Fill the tensors that are ``wanted`` of a bucket; all ranks see all of it, a piece at a time,
    which takes as many elements of each rank's shard, from the same place in it.
    """
    group = part.data_parallel_group
    size = group.size()
    data = part.buffers[buffer].buckets[bucket].grad_data
    length = data.numel() // size
    ranges = _ranges(part, buffer, bucket)
    width = max(1, _PIECE // size)
    for start in range(0, length, width):
        room = min(width, length - start)  # of which padding stays as it is
        pieces = {name: torch.empty(room, device=data.device) for name in names}
        for parameter, found in ranges.items():
            local = found["gbuf_local"]
            if local.start < start + room and start < local.end:
                values = part._get_main_param_and_optimizer_states(parameter)
                for name, piece in pieces.items():
                    _copy(values[name].detach().flatten(), local.start, piece, start)
        for name, piece in pieces.items():
            everything = piece
            if size > 1:
                everything = torch.empty(size * room, device=data.device)
                dist.all_gather_into_tensor(everything, piece, group=group)
            for one, tensors in wanted.items():
                for rank in range(one.start // length, (one.end - 1) // length + 1):
                    of_rank = everything[rank * room : (rank + 1) * room]
                    _copy(of_rank, rank * length + start, tensors[name], one.start)


def _copy(source: Tensor, source_start: int, target: Tensor, target_start: int) -> None:
    """Copy what two flat tensors have in common.

    Args:
        source, target: the tensors.
        source_start, target_start: of each the place of its first element.
    """
    start = max(source_start, target_start)
    end = min(source_start + len(source), target_start + len(target))
    if start < end:
        target[start - target_start : end - target_start].copy_(
            source[start - source_start : end - source_start]
        )
