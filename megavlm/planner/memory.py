"""Memory of a rank, predicted from the configuration.

A bfloat16 parameter takes two bytes; a trainable one also has a float32 gradient, and a main weight
and moments, which are sharded over the ranks that reduce its gradient. Activations are kept for
every microbatch in flight; they are freed before the optimizer updates, which may need copies of
its own. Not counted: CUDA's own memory, NCCL's buffers, and fragmentation; leave a tenth of the
device for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megavlm.config.lora import NF4_BLOCK
from megavlm.config.schema import Config
from megavlm.planner.activations import NUMBER_BYTES, activation_memory
from megavlm.planner.layout import Layout
from megavlm.planner.parameters import ParameterCounts, parameters_on_rank
from megavlm.planner.rank_load import RankLoad
from megavlm.planner.schedule import in_flight

_GRADIENT = 4
# Main weights are float32 beside bfloat16 weights; float32 weights are their own main weights.
_MAIN = 4
_MOMENTS = {"float32": 8, "bfloat16": 4}
# SGD and Muon have one moment.
_MOMENTUM = 4
# An FP8 copy of a weight and that copy's transpose, which Hopper's matrix products read.
_FP8_COPIES = 2
# A code, and a float32 scale for each block.
_NF4_BYTES = 0.5 + 4 / NF4_BLOCK
# Elements that one slice of an update with bfloat16 moments has (see ``train/sliced_update``), and
# bytes of the float32 copies of both moments of each.
UPDATE_SLICE = 2**29
_MOMENT_COPIES = 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Args:
        weights: of the model.
        gradients: of what is trained.
        optimizer: main weights and moments, and averages, this rank's shard.
        activations: kept for the backward pass, of all microbatches in flight, and the logits.
        update: copies that the optimizer makes inside its step, when activations are gone.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    update: float = 0.0

    @property
    def total(self) -> float:
        """Return the most that is there at one time."""
        passing = max(self.activations, self.update)
        return self.weights + self.gradients + self.optimizer + passing


def memory(
    config: Config,
    layout: Layout,
    data_ranks: int,
    *,
    capacity: int,
    tiles: float,
    supervised: float | None = None,
    image_tiles: float = 0.0,
) -> Memory:
    """Estimate the memory of the rank that needs the most; arguments as for ``memory_by_rank``."""
    return max(
        memory_by_rank(
            config,
            layout,
            data_ranks,
            capacity=capacity,
            tiles=tiles,
            supervised=supervised,
            image_tiles=image_tiles,
        ),
        key=lambda one: one.total,
    )


def memory_by_rank(
    config: Config,
    layout: Layout,
    data_ranks: int,
    *,
    capacity: int,
    tiles: float,
    supervised: float | None = None,
    image_tiles: float = 0.0,
) -> list[Memory]:
    """Estimate the memory of each pipeline rank.

    Args:
        config: the run.
        layout: layers of every chunk.
        data_ranks: data-parallel replicas.
        capacity: tokens of a pack.
        tiles: tiles of a pack, at most.
        supervised: tokens of a pack that have a loss, at most; none: all.
        image_tiles: of an image, if each rank has whole images; 0: ranks share tiles.
    """
    parallel = config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    packs = config.training.global_batch_size // data_ranks
    seen = supervised if config.training.head_tokens == "supervised" else None
    load = RankLoad.most(parallel, capacity, tiles, seen, image_tiles)
    kept = [activation_memory(config, chunk, load) for chunk in layout.chunks]
    own_pairs = packs * tiles
    of_step = config.architecture.needs.step_bytes(
        config.architecture, own_pairs, own_pairs * data_ranks
    )
    needed = []
    for rank in range(pipeline):
        held = sum(
            (parameters_on_rank(config, chunk) for chunk in layout.chunks[rank::pipeline]),
            ParameterCounts(),
        )
        own = kept[rank::pipeline]
        most = (
            in_flight(pipeline, rank, virtual, packs)
            @ np.array([one.per_microbatch for one in own])
        ).max()
        activations = float(most) + max(one.once for one in own)
        if rank == pipeline - 1 and of_step:
            # Between the two passes of several packs there are no activations.
            activations = activations + of_step if packs == 1 else max(activations, of_step)
        needed.append(Memory(**weight_bytes(config, held, data_ranks), activations=activations))
    return needed


def sharing_ranks(config: Config, data_ranks: int) -> tuple[int, int]:
    """Count the ranks that reduce gradients and shard the optimizer state, of all parameters but
    those of experts, and of these: the latter are all ranks of a pipeline stage that hold the same
    experts.
    """
    parallel = config.parallel
    sharing = data_ranks * parallel.context_parallel_size
    stage = sharing * parallel.tensor_model_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return sharing, stage // experts


def weight_bytes(config: Config, held: ParameterCounts, data_ranks: int) -> dict[str, float]:
    """Count the bytes of weights, of gradients, of the optimizer and of its update.

    Args:
        config: the run.
        held: parameters on the rank.
        data_ranks: data-parallel replicas.
    """
    sharing, of_experts = sharing_ranks(config, data_ranks)
    moments = config.optimizer.moments
    main = _MAIN if config.training.precision == "bfloat16" else 0
    average = _MAIN if config.ema.decay else 0
    weights = NUMBER_BYTES[config.training.precision] * (held.weights - held.in_nf4)
    weights += _NF4_BYTES * held.in_nf4 + _FP8_COPIES * held.in_fp8
    experts = held.trained_experts
    updated = (held.trained - experts) / sharing + experts / of_experts
    with_one = {
        "sgd": updated,
        "muon": held.trained_by_muon / sharing + held.trained_experts_by_muon / of_experts,
    }.get(config.optimizer.kind, 0.0)
    copied = min(updated, UPDATE_SLICE) if moments == "bfloat16" else 0.0
    return {
        "weights": float(weights),
        "gradients": float(_GRADIENT * held.trained),
        "optimizer": (main + _MOMENTS[moments] + average) * updated - _MOMENTUM * with_one,
        "update": _MOMENT_COPIES * copied,
    }
