"""How fast a layout would be on given GPUs: an estimate for choosing between layouts, not a promise.

A step takes as long as the pipeline needs for its packs, (packs + chunks - 1) times the slowest chunk (Narayanan et al., arXiv 2104.04473,
section 2.2), and what communication is not hidden: tensor parallelism's collectives inside every layer, which wait for each other, and, of
the sums of gradients and the collection of weights, what is longer than the computation beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.mask import trains
from megavlm.config.rules import layout_problems
from megavlm.config.schema import Config, Parallel
from megavlm.parallel.layout import Layout, make_layout
from megavlm.parallel.memory import Memory, memory
from megavlm.parallel.split import PackSize, layer_costs

_BF16 = 2
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPUs and what connects them; rates are those of the vendors' data sheets.

    Args:
        tflops: dense bfloat16, in 10^12 operations a second.
        memory_gib: of a GPU.
        node_gb_per_s: between GPUs of a node, each way, in 10^9 bytes a second.
        network_gb_per_s: between nodes, each way, for each GPU.
        gpus_per_node: GPUs of a node.
        efficiency: share of ``tflops`` that whole training steps reach.
    """

    tflops: float = 989.0
    memory_gib: float = 80.0
    node_gb_per_s: float = 450.0
    network_gb_per_s: float = 50.0
    gpus_per_node: int = 8
    efficiency: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout and what is expected of it.

    Args:
        parallel: sizes of the layout, with the layers of each chunk as text.
        data_ranks: copies of the model.
        memory: of the rank that needs most.
        chunk_ms: time of each chunk for one pack.
        bubble: share of a step in which a rank of the pipeline waits.
        tensor_gb: bytes, in 10^9, that tensor parallelism sends from each GPU in a step.
        data_gb: the same for gradients and weights.
        step_ms: time of a step.
        tokens_per_s: of one GPU.
    """

    parallel: Parallel
    data_ranks: int
    memory: Memory
    chunk_ms: tuple[float, ...]
    bubble: float
    tensor_gb: float
    data_gb: float
    step_ms: float
    tokens_per_s: float

    @property
    def memory_gib(self) -> float:
        """Of the rank that needs most."""
        return self.memory.total / _GIB


def layouts(config: Config, gpus: int, size: PackSize, capacity: int, hardware: Hardware) -> list[Estimate]:
    """Every layout that can run and fits into nine tenths of the memory, the fastest first.

    Args:
        config: the run; its layout is not looked at.
        gpus: ranks.
        size: of a pack, on average.
        capacity: tokens of a pack, with padding.
        hardware: the GPUs.
    """
    found = [estimate(candidate, gpus, size, capacity, hardware) for candidate in _candidates(config, gpus)]
    return sorted((one for one in found if one.memory_gib <= 0.9 * hardware.memory_gib), key=lambda one: one.step_ms)


def _candidates(config: Config, gpus: int) -> Iterator[Config]:
    layers = config.architecture.vision.num_layers + config.architecture.language.num_layers
    powers = [2**power for power in range(11)]
    for tensor in [size for size in powers if size <= min(gpus, 8)]:
        for pipeline in [size for size in powers if tensor * size <= gpus and size <= layers]:
            for recompute in ("none", "selective", "full"):
                parallel = Parallel(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    sequence_parallel=tensor > 1,
                    recompute=recompute,
                )
                candidate = dataclasses.replace(config, parallel=parallel)
                if not layout_problems(candidate, gpus):
                    yield candidate


def estimate(config: Config, gpus: int, size: PackSize, capacity: int, hardware: Hardware) -> Estimate:
    """What is expected of one layout; arguments as for ``layouts``."""
    parallel = config.parallel
    tensor, chunks = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data_ranks = gpus // parallel.model_parallel_size
    packs = config.training.global_batch_size // data_ranks
    layout = make_layout(config, size)
    needed = memory(config, layout, data_ranks, capacity=capacity, tiles=1.04 * size.tiles)
    tensor_bytes = [_tensor_bytes(config, layout, number, size, capacity) for number in range(chunks)]
    rate = hardware.node_gb_per_s if tensor <= hardware.gpus_per_node else hardware.network_gb_per_s
    times = [
        flops / tensor / (hardware.tflops * hardware.efficiency * 1e12) + sent / (rate * 1e9)
        for flops, sent in zip(_chunk_flops(config, layout, size), tensor_bytes, strict=True)
    ]
    slowest = max(times)
    inside = (packs + chunks - 1) * slowest
    # Gradients in float32 one way, weights in bfloat16 the other: each rank sends its part of the ring's round.
    data_bytes = (needed.gradients + needed.gradients / 2) * (data_ranks - 1) / data_ranks
    crosses = parallel.model_parallel_size * data_ranks > hardware.gpus_per_node
    shared = data_bytes / ((hardware.network_gb_per_s if crosses else hardware.node_gb_per_s) * 1e9)
    seconds = inside + max(0.0, shared - slowest)  # hidden behind the last backward and the next forward pass
    return Estimate(
        parallel=dataclasses.replace(parallel, layout=str(layout)),
        data_ranks=data_ranks,
        memory=needed,
        chunk_ms=tuple(time * 1e3 for time in times),
        bubble=(chunks - 1) / (packs + chunks - 1),
        tensor_gb=max(tensor_bytes) * packs / 1e9,
        data_gb=data_bytes / 1e9,
        step_ms=seconds * 1e3,
        tokens_per_s=config.training.global_batch_size * size.tokens / seconds / gpus,
    )


def _chunk_flops(config: Config, layout: Layout, size: PackSize) -> list[float]:
    """FLOPs of each chunk for one pack, what is computed again included."""
    costs = layer_costs(config.architecture, config.training.trainable, size)
    forward = layer_costs(config.architecture, (), size)
    extra = {"none": 0.0, "selective": 0.4, "full": 1.0}[config.parallel.recompute]
    found, start = [], 0
    for chunk in layout.chunks:
        end = start + len(chunk.vision_layers) + len(chunk.language_layers)
        # Only what has a backward pass is computed again.
        again = [extra * once for once, whole in zip(forward[start:end], costs[start:end], strict=True) if whole > once]
        found.append(sum(costs[start:end]) + sum(again))
        start = end
    return found


def _tensor_bytes(config: Config, layout: Layout, number: int, size: PackSize, capacity: int) -> float:
    """Bytes that a rank sends for one pack: two sums of the activations in each layer forward, two backward (arXiv 1909.08053)."""
    arch, chunk, tensor = config.architecture, layout.chunks[number], config.parallel.tensor_model_parallel_size
    vision = len(chunk.vision_layers) * size.tiles * arch.vision.tokens * arch.vision.hidden_size
    language = len(chunk.language_layers) * capacity * arch.language.hidden_size
    trains_vision = trains("vision", config.training.trainable)
    # A sum over a ring sends every number almost twice; so do the gathering and scattering of sequence parallelism together.
    return 2 * (tensor - 1) / tensor * _BF16 * (vision * (4 if trains_vision else 2) + language * 4)
