"""The process groups of a run, and this rank's position in each: the only module that uses
megatron-core's ``parallel_state``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megavlm.config.schema import Parallel
from megavlm.data.loading.rank_slice import RankSlice


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups, their sizes, and this rank's position in each.

    Args:
        collection: megatron-core's groups, for the modules that take them.
        vision: the same for the vision encoder and the connector; if these are replicated over the
            tensor-parallel ranks, the tensor-parallel group in it has this rank alone.
        rank_slice: the tiles and tokens of a pack that this rank gets.
        rank, size: position among all ranks.
        tensor_rank, tensor_size: position among the tensor-parallel ranks.
        context_rank, context_size: position among the context-parallel ranks.
        pipeline_rank, pipeline_size: position among the pipeline-parallel ranks.
        data_rank, data_size: position among the data-parallel replicas.
    """

    collection: ProcessGroupCollection
    vision: ProcessGroupCollection
    rank_slice: RankSlice
    rank: int
    size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def has_last_chunk(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes to the console and to files; it has the last chunk, where the
        loss is known.
        """
        return (
            self.has_last_chunk
            and self.tensor_rank == 0
            and self.context_rank == 0
            and self.data_rank == 0
        )

    def by_kind(self) -> dict[str, dist.ProcessGroup]:
        """Return this rank's group of each kind. ``data`` is the group that sums gradients, so it
        includes the context-parallel ranks.
        """
        of = self.collection
        return {
            "tensor": of.tp,
            "context": of.cp,
            "pipeline": of.pp,
            "expert": of.ep,
            "data": of.dp_cp,
        }

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over data-parallel replicas and context-parallel ranks."""
        dist.all_reduce(values, group=self.collection.dp_cp)
        return values

    def from_writer(self, value: float, device: torch.device) -> float:
        """Return the writing rank's ``value`` on every rank. Collective, and synchronises."""
        given = value if self.is_writer else 0.0
        answer = torch.tensor([given], dtype=torch.float64, device=device)
        dist.all_reduce(answer)
        return float(answer.item())

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is set on any rank. Collective, and synchronises."""
        answer = torch.tensor([float(flag)], device=device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer.item())


def _initialize(parallel: Parallel, embedding_chunk: int) -> None:
    """Let megatron-core create its groups; arguments as of ``create``. Collective."""
    virtual = parallel.virtual_pipeline_model_parallel_size

    # ``parallel_state.initialize_model_parallel`` calls it for each pipeline; its group sums the
    # gradients of tied heads.
    def embedding_ranks(pipeline: list[int], split: int | None = None) -> list[int]:
        return sorted({pipeline[embedding_chunk % len(pipeline)], pipeline[-1]})

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.timeout_minutes,
        get_embedding_ranks=embedding_ranks,
        # A connection to every other data-parallel rank for each of three groups, which are for
        # checkpoints that are gathered on the hosts.
        create_gloo_process_groups=False,
    )


def create(parallel: Parallel, seed: int, embedding_chunk: int = 0) -> Groups:
    """Create the process groups. Collective: every rank calls it.

    Args:
        parallel: sizes of the layout.
        seed: of the random states that megatron-core keeps; nothing in training draws from them.
        embedding_chunk: number of the chunk with the token embedding, whose gradient is summed with
            that of a tied head in the last one.
    """
    _initialize(parallel, embedding_chunk)
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    context_rank = parallel_state.get_context_parallel_rank()
    context_size = parallel_state.get_context_parallel_world_size()
    vision = collection
    tile_rank = context_rank
    tile_ranks = context_size
    if parallel.vision == "data":
        vision = copy.copy(collection)
        vision.tp = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        tile_rank = context_rank * tensor_size + tensor_rank
        tile_ranks = context_size * tensor_size
    return Groups(
        collection=collection,
        vision=vision,
        rank_slice=RankSlice(
            tile_rank=tile_rank,
            tile_ranks=tile_ranks,
            context_rank=context_rank,
            context_ranks=context_size,
        ),
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        context_rank=context_rank,
        context_size=context_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def destroy() -> None:
    """Forget the groups, so that others can be created in the same process (the tests do)."""
    parallel_state.destroy_model_parallel()
