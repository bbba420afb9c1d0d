"""What a rank sends: bytes, by the kind of parallelism that asks for it.

Tensor parallelism sums activations twice in each layer forward, twice backward (Shoeybi et al.,
arXiv 1909.08053); a sum over a ring of k ranks sends every number 2 (k - 1) / k times, and so do
the gathering and scattering that take its place with sequence parallelism (arXiv 2205.05198). There
a trained layer also gathers its inputs anew in the backward pass. Context parallelism gathers keys
and values in every layer, and scatters their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.schema import LAYER_PARTS, Config
from megavlm.planner.activations import NUMBER_BYTES, RankShare, has_backward
from megavlm.planner.layout import Chunk, Layout
from megavlm.planner.parameters import Held, copied_head, held_by

_GRADIENT = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends.

    Args:
        tensor: to ranks that share its layers.
        context: to ranks that share its packs.
        pipeline: to the ranks of the chunks before and behind its own.
        data: to ranks that have the same weights.
    """

    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            tensor=self.tensor + other.tensor,
            context=self.context + other.context,
            pipeline=self.pipeline + other.pipeline,
            data=self.data + other.data,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(
            tensor=self.tensor * times,
            context=self.context * times,
            pipeline=self.pipeline * times,
            data=self.data * times,
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.context + self.pipeline + self.data


def of_pack(config: Config, layout: Layout, number: int, capacity: int, tiles: float) -> Traffic:
    """Estimate what a rank sends for one microbatch's forward and backward pass through one of its
    chunks.

    Args:
        config: the run.
        layout: layers of every chunk.
        number: of the chunk.
        capacity: tokens of a pack, with padding.
        tiles: tiles of a pack, on average.
    """
    chunk = layout.chunks[number]
    share = RankShare.mean(config.parallel, capacity, tiles)
    size = NUMBER_BYTES[config.training.precision]
    return Traffic(
        tensor=size * _tensor(config, chunk, share),
        context=size * _context(config, chunk, capacity, share),
        pipeline=size * _pipeline(config, layout, number, share),
    )


def of_step(config: Config, layout: Layout, rank: int, data_ranks: int) -> Traffic:
    """Estimate what a pipeline rank sends once a step: gradients and updated parameters."""
    parallel = config.parallel
    held = sum(
        (
            held_by(config, chunk)
            for chunk in layout.chunks[rank :: parallel.pipeline_model_parallel_size]
        ),
        Held(),
    )
    sharing = data_ranks * parallel.context_parallel_size
    tensor = parallel.tensor_model_parallel_size
    number = (_GRADIENT + NUMBER_BYTES[config.training.precision]) * (sharing - 1) / sharing
    with_copies = {
        chunk % parallel.pipeline_model_parallel_size
        for chunk in (layout.embedding_chunk, len(layout.chunks) - 1)
    }
    sums_copies = len(with_copies) > 1 and rank in with_copies
    return Traffic(
        tensor=2 * (tensor - 1) / tensor * _GRADIENT * held.trained_copies,
        pipeline=float(_GRADIENT * copied_head(config, layout.chunks) * sums_copies),
        data=number * held.trained,
    )


def _tensor(config: Config, chunk: Chunk, share: RankShare) -> float:
    """Numbers."""
    arch = config.architecture
    parallel = config.parallel
    tensor = config.parallel.tensor_model_parallel_size
    ring = 2 * (tensor - 1) / tensor
    backward = has_backward(config)
    is_trained = held_by(config, chunk).trained > 0
    again = {
        part: {"none": 0, "selective": 1, "full": 2}[parallel.recompute_of(part)]
        for part in LAYER_PARTS
    }
    found = 0.0
    for place in chunk.places(arch.vision.num_layers):
        in_vision = place < arch.vision.num_layers
        computed_again = again["vision" if in_vision else "language"]
        sums = (
            2
            + (2 + computed_again + (parallel.sequence_parallel and is_trained and not in_vision))
            * backward[place]
        )
        if not in_vision:
            found += sums * share.tokens * arch.language.hidden_size
        elif parallel.vision == "tensor":
            found += sums * share.tiles * arch.vision.tokens * arch.vision.hidden_size
    features = share.tiles * arch.features_per_tile * arch.language.hidden_size
    if (
        chunk.has_connector
    ):  # the embedding's sum; the connector's, or the gathering of all ranks' features
        found += share.tokens * arch.language.hidden_size + (
            2 * share.tiles * arch.connector_sizes.summed
            if parallel.vision == "tensor"
            else features * tensor / 2
        )
    if chunk.has_head:
        found += share.tokens * arch.language.hidden_size
    return ring * found


def _context(config: Config, chunk: Chunk, capacity: int, share: RankShare) -> float:
    """Numbers."""
    arch = config.architecture
    parallel = config.parallel
    ranks = config.parallel.context_parallel_size
    language = arch.language
    others = (config.parallel.context_parallel_size - 1) / config.parallel.context_parallel_size
    heads = max(language.num_query_groups // parallel.tensor_model_parallel_size, 1)
    gathered = 2 * heads * language.head_size * capacity
    backward = has_backward(config)
    found = 0.0
    for layer in chunk.language_layers:
        found += gathered * (
            1
            + (1 + (parallel.recompute_of("language") == "full"))
            * backward[arch.vision.num_layers + layer]
        )
    if chunk.has_connector:
        of_all = share.tiles * parallel.tile_ranks * arch.features_per_tile * language.hidden_size
        found += 2 * of_all
    return others * found if ranks > 1 else 0.0


def _pipeline(config: Config, layout: Layout, number: int, share: RankShare) -> float:
    """Numbers: what goes on, and the gradient of what came, where anything before asks for one."""
    first_trained = next(
        n for n, chunk in enumerate(layout.chunks) if held_by(config, chunk).trained
    )
    sent = _border(config, layout.chunks[number], share) if number + 1 < len(layout.chunks) else 0.0
    returned = _border(config, layout.chunks[number - 1], share) if first_trained < number else 0.0
    return sent + returned


def _border(config: Config, before: Chunk, share: RankShare) -> float:
    """Numbers that a rank sends to the chunk behind ``before``."""
    arch = config.architecture
    parallel = config.parallel
    if not before.language_layers:
        return share.tiles * arch.vision.tokens * arch.vision.hidden_size
    return (
        share.tokens
        / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
        * arch.language.hidden_size
    )
