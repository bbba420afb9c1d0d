"""How fast a layout would be on given GPUs: an estimate for choosing between layouts, not a
promise.

A step takes as long as the pipeline needs for its packs: their number, and the bubble, times the
slowest chunk (Narayanan et al., arXiv 2104.04473, section 2.2); and what communication is not
hidden. Collectives inside the layers and what travels between chunks count in full. Of the sums of
gradients and the collection of weights counts what is longer than the computation beside it, the
last backward and the first forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megavlm.config.padding import padded_heads
from megavlm.config.schema import Architecture, Config, Parallel
from megavlm.planner.communication import (
    CommunicationVolume,
    communication_per_microbatch,
    communication_per_step,
    synchronised_per_step,
)
from megavlm.planner.flops import pieces
from megavlm.planner.layout import Layout, make_layout
from megavlm.planner.memory import Memory, memory
from megavlm.planner.partition import PackSize, layer_costs, run_costs
from megavlm.planner.rank_load import RankLoad, image_tiles
from megavlm.planner.schedule import bubble

_GIB = 2**30
# The rest is for CUDA, NCCL, and what the allocator cannot use.
USABLE = 0.9
# Packs are alike, not equal: the fullest holds this many times the mean of tiles.
_MOST_TILES = 1.04
# Nothing evens out supervised tokens: this many times the mean of them.
_MOST_SUPERVISED = 1.5


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

    def holds(self, memory: Memory) -> bool:
        """Whether nine tenths of a GPU's memory are enough for a rank."""
        return memory.total <= USABLE * self.memory_gib * _GIB


@dataclass(frozen=True, kw_only=True)
class Packs:
    """What the packs of a plan hold.

    Args:
        size: of a pack, on average.
        capacity: tokens of a pack, with padding.
        alignment: each sample starts at a multiple of this many tokens; None: the packs are not
            made yet.
    """

    size: PackSize
    capacity: int
    alignment: int | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout and what is expected of it.

    Args:
        parallel: sizes of the layout, with the layers of each chunk as text.
        data_ranks: data-parallel replicas.
        packs: microbatches of a step on each replica.
        memory: of the rank that needs most.
        chunk_ms: time of each chunk for one pack, in the order of the pipeline: chunk c stands on
            rank c % ranks.
        bubble: bubble ratio of the pipeline: idle time over working time.
        communication: bytes that a GPU sends in a step; of each kind, of the GPU that sends most.
        exposed_ms: of a step: communication of gradients and parameters that no computation hides.
        step_ms: time of a step.
        tokens_per_s: of one GPU.
    """

    parallel: Parallel
    data_ranks: int
    packs: int
    memory: Memory
    chunk_ms: tuple[float, ...]
    bubble: float
    communication: CommunicationVolume
    exposed_ms: float
    step_ms: float
    tokens_per_s: float

    @property
    def memory_gib(self) -> float:
        """Of the rank that needs most."""
        return self.memory.total / _GIB

    def fits(self, hardware: Hardware) -> bool:
        """Whether it needs nine tenths of the memory at most."""
        return hardware.holds(self.memory)


def estimate_memory(config: Config, gpus: int, packs: Packs) -> Memory:
    """Estimate the memory of the rank that needs most; arguments as for ``estimate``."""
    return _memory(config, make_layout(config, packs.size), gpus, packs)


def estimate(config: Config, gpus: int, packs: Packs, hardware: Hardware) -> Estimate:
    """Estimate the time, memory and communication of one layout.

    Args:
        config: the run, with its layout.
        gpus: ranks.
        packs: what it trains on.
        hardware: the GPUs.
    """
    size = packs.size
    parallel = config.parallel
    ranks = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    data_ranks = gpus // parallel.model_parallel_size
    microbatches = config.training.global_batch_size // data_ranks
    layout = make_layout(config, size)
    runs_twice = _runs_twice(config, microbatches, data_ranks)
    per_microbatch = _per_microbatch(config, layout, packs, runs_twice)
    rates = _rates(parallel, gpus, hardware)
    sending = [_seconds(one, rates) for one in per_microbatch]
    forward, whole = (
        _compute_seconds(config, layout, size, costs, hardware)
        for costs in _layer_costs(config, size)
    )
    beside = [
        (sum(forward[rank::ranks]), sum(whole[rank::ranks]) - sum(forward[rank::ranks]))
        for rank in range(ranks)
    ]
    if runs_twice:
        whole = [one + again for one, again in zip(whole, forward, strict=True)]
    times = [compute + sent for compute, sent in zip(whole, sending, strict=True)]
    idle = bubble(ranks, virtual, microbatches)
    inside = microbatches * _round_seconds(times, ranks) * (1 + idle)
    per_step = [
        communication_per_step(config, layout, rank, data_ranks, size.tiles)
        for rank in range(ranks)
    ]
    sent = [
        sum(per_microbatch[rank::ranks], CommunicationVolume()) * microbatches + step
        for rank, step in enumerate(per_step)
    ]
    exposed = max(
        _exposed(
            parallel, step, synchronised_per_step(config, layout, rank, data_ranks), rates, *times
        )
        for rank, (step, times) in enumerate(zip(per_step, beside, strict=True))
    )
    seconds = inside + exposed
    return Estimate(
        parallel=dataclasses.replace(parallel, layout=str(layout)),
        data_ranks=data_ranks,
        packs=microbatches,
        memory=_memory(config, layout, gpus, packs),
        chunk_ms=tuple(time * 1e3 for time in times),
        bubble=idle,
        communication=_busiest(sent),
        exposed_ms=exposed * 1e3,
        step_ms=seconds * 1e3,
        tokens_per_s=config.training.global_batch_size * size.tokens / seconds / gpus,
    )


def _runs_twice(config: Config, microbatches: int, data_ranks: int) -> bool:
    """Return whether packs run forward twice, since the losses of several need each other."""
    arch = config.architecture
    return arch.needs.packs_at_once(arch, microbatches, data_ranks) > 1


def _per_microbatch(
    config: Config, layout: Layout, packs: Packs, runs_twice: bool
) -> list[CommunicationVolume]:
    """Estimate what each chunk sends for a pack, which may run forward once before."""
    size = packs.size.seen_by_head(config.training.head_tokens)
    frozen = dataclasses.replace(config.training, trainable=())
    forward_only = dataclasses.replace(config, training=frozen)
    return [
        sum(
            (
                communication_per_microbatch(
                    one,
                    layout,
                    number,
                    packs.capacity,
                    size.tiles,
                    size.supervised,
                    image_tiles(config.architecture, size),
                )
                for one in ((config, forward_only) if runs_twice else (config,))
            ),
            CommunicationVolume(),
        )
        for number in range(len(layout.chunks))
    ]


def _round_seconds(times: Sequence[float], ranks: int) -> float:
    """Return the seconds of a microbatch. With interleaved 1F1B it goes several rounds over the
    ranks, each as slow as its slowest chunk.
    """
    rounds = range(0, len(times), ranks)
    return sum(max(times[start : start + ranks]) for start in rounds)


def _memory(config: Config, layout: Layout, gpus: int, packs: Packs) -> Memory:
    """Estimate the memory of the rank that needs most, for the fullest pack that is expected."""
    size = packs.size
    return memory(
        config,
        layout,
        gpus // config.parallel.model_parallel_size,
        capacity=packs.capacity,
        tiles=_MOST_TILES * size.tiles,
        supervised=None if size.supervised is None else _MOST_SUPERVISED * size.supervised,
        image_tiles=image_tiles(config.architecture, size),
    )


def _rates(parallel: Parallel, gpus: int, hardware: Hardware) -> CommunicationVolume:
    """Return bytes a second by kind: tensor-parallel ranks are neighbours, then context-parallel
    ranks, then data-parallel replicas, then pipeline stages.
    """
    tensor = parallel.tensor_model_parallel_size
    model = tensor * parallel.context_parallel_size
    reach = {
        "tensor": tensor,
        "context": model,
        "data": gpus // parallel.pipeline_model_parallel_size,
        "expert": parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
        "pipeline": gpus,
    }

    def rate(gpus: int) -> float:
        return 1e9 * (
            hardware.node_gb_per_s if gpus <= hardware.gpus_per_node else hardware.network_gb_per_s
        )

    return CommunicationVolume(**{kind: rate(size) for kind, size in reach.items()})


def _seconds(sent: CommunicationVolume, rates: CommunicationVolume) -> float:
    return (
        sent.tensor / rates.tensor
        + sent.context / rates.context
        + sent.pipeline / rates.pipeline
        + sent.expert / rates.expert
    )


def _exposed(
    parallel: Parallel,
    step: CommunicationVolume,
    synchronised: tuple[float, float],
    rates: CommunicationVolume,
    forward: float,
    backward: float,
) -> float:
    """Seconds of a step in which a rank does nothing but exchange gradients and weights.

    Args:
        parallel: the layout.
        step: what it sends.
        synchronised: of this, the bytes of gradients and of weights.
        rates: bytes a second.
        forward, backward: seconds that it computes on a pack, beside which data may travel.
    """
    gradients, weights = (sent / rates.data for sent in synchronised)
    others = (step.data - sum(synchronised)) / rates.data
    if parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - backward)
    if parallel.overlap_param_gather:
        weights = max(0.0, weights - forward)
    return gradients + weights + others + _seconds(step, rates)


def _layer_costs(config: Config, size: PackSize) -> tuple[list[float], list[float]]:
    """FLOPs of each layer for a pack: forward, and in all."""
    arch = config.architecture
    size = size.seen_by_head(config.training.head_tokens)
    whole = run_costs(config, size)
    if config.loss.is_by_block:  # the backward pass computes the logits again
        tokens = size.tokens if size.supervised is None else size.supervised
        whole[-1] += 2 * arch.language.hidden_size * arch.language.vocab_size * tokens
    return layer_costs(arch, (), size), whole


def _compute_seconds(
    config: Config, layout: Layout, size: PackSize, costs: list[float], hardware: Hardware
) -> list[float]:
    """Of each chunk for one pack."""
    parallel = config.parallel
    vision = config.architecture.vision.num_layers
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    rate = hardware.tflops * hardware.efficiency * 1e12 * ranks
    padding = _vision_padding(config, size)
    spread = [cost * padding if layer < vision else cost for layer, cost in enumerate(costs)]
    return [
        sum(spread[layer] for layer in chunk.layer_numbers(vision)) / rate
        for chunk in layout.chunks
    ]


def _vision_padding(config: Config, size: PackSize) -> float:
    """How many times the work of the vision encoder is done that is asked for: padding tiles, and
    heads that only fill up.
    """
    if not size.tiles or not config.architecture.vision.exists:
        return 1.0
    parallel = config.parallel
    vision = config.architecture.vision
    of_image = image_tiles(config.architecture, size)
    load = RankLoad.mean(parallel, 1, size.tiles, image_tiles=of_image)
    tiles = load.tiles * parallel.tile_ranks / size.tiles
    heads = (
        padded_heads(vision.num_attention_heads, parallel.vision_tensor_size)
        / vision.num_attention_heads
    )
    return tiles * (1 + _attention_share(config.architecture, size) * (heads - 1))


@lru_cache(maxsize=8)
def _attention_share(arch: Architecture, size: PackSize) -> float:
    """Share of the vision layers' FLOPs that grows with their heads."""
    units = size.units()
    attention = whole = 0.0
    for piece in pieces(arch):
        if piece.part == "vision" and piece.layer is not None:
            cost = piece.forward * units[piece.unit]
            whole += cost
            if not piece.key or ".self_attention." in piece.key:
                attention += cost
    return attention / whole


def _busiest(ranks: list[CommunicationVolume]) -> CommunicationVolume:
    """Return the most of each kind that any rank sends."""
    kinds = vars(ranks[0])
    return CommunicationVolume(**{kind: max(vars(rank)[kind] for rank in ranks) for kind in kinds})
