"""How much memory a rank needs, reckoned from the configuration.

Weights take two bytes a number in bfloat16; a trained one has a gradient of four, and its main weight and moments, which data-parallel
ranks share out. Activations are what the backward pass reads again, counted tensor by tensor as Korthikanti et al. do (arXiv
2205.05198, section 4), for attention that keeps no probabilities and without dropout. Not counted: CUDA's own, NCCL's buffers, and what
the allocator cannot use; leave a tenth of the device for them.

Shape letters: D hidden size, M hidden size of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.mask import matches, trains
from megavlm.config.schema import Architecture, Config
from megavlm.parallel.cost import Piece, pieces
from megavlm.parallel.layout import Chunk, Layout

_WEIGHT, _GRADIENT = 2, 4
# With moments in 16 bits, of a main weight only what the model's own weight lacks is kept.
_MAIN = {"float32": 4, "bfloat16": 2}
_MOMENTS = {"float32": 8, "bfloat16": 4}
# Of a logit: in 16 bits, its gradient, and the exponentials in 32 bits while the loss is computed.
_LOGIT = 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Args:
        weights: of the model.
        gradients: of what is trained.
        optimizer: main weights and moments, this rank's share.
        activations: kept for the backward pass, of all packs that are under way, and the logits.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: Config, layout: Layout, data_ranks: int, *, capacity: int, tiles: float) -> Memory:
    """What the rank with the most needs.

    Args:
        config: the run.
        layout: layers of every chunk.
        data_ranks: copies of the model.
        capacity: tokens of a pack.
        tiles: tiles of a pack, at most.
    """
    chunks = range(len(layout.chunks))
    packs = config.training.global_batch_size // data_ranks
    under_way = [min(len(layout.chunks) - number, packs) for number in chunks]
    each = [_chunk(config, layout.chunks[number], data_ranks, under_way[number], capacity, tiles) for number in chunks]
    return max(each, key=lambda one: one.total)


def _chunk(config: Config, chunk: Chunk, data_ranks: int, under_way: int, capacity: int, tiles: float) -> Memory:
    tensor, trainable = config.parallel.tensor_model_parallel_size, config.training.trainable
    held = [piece for piece in pieces(config.architecture) if piece.key and _stands_in(piece, chunk)]
    trained = sum(piece.numbers for piece in held if any(matches(piece.key, pattern) for pattern in trainable)) / tensor
    return Memory(
        weights=_WEIGHT * sum(piece.numbers for piece in held) / tensor,
        gradients=_GRADIENT * trained,
        optimizer=(_MAIN[config.optimizer.moments] + _MOMENTS[config.optimizer.moments]) * trained / data_ranks,
        activations=_activations(config, chunk, under_way, capacity, tiles),
    )


def _stands_in(piece: Piece, chunk: Chunk) -> bool:
    if piece.layer is not None:
        return piece.layer in (chunk.vision_layers if piece.part == "vision" else chunk.language_layers)
    ends = {"vision": chunk.has_patch_embedding, "projector": chunk.has_projector, "language": chunk.has_projector, "head": chunk.has_head}
    return ends[piece.part]


def _activations(config: Config, chunk: Chunk, under_way: int, capacity: int, tiles: float) -> float:
    arch, parallel, tensor = config.architecture, config.parallel, config.parallel.tensor_model_parallel_size
    trains_vision = trains("vision", config.training.trainable)
    vision = _kept(
        vision_layer(arch, tensor), arch.vision.hidden_size, len(chunk.vision_layers), under_way * trains_vision, parallel.recompute
    )
    language = _kept(
        language_layer(arch, tensor, parallel.sequence_parallel),
        arch.language.hidden_size,
        len(chunk.language_layers),
        under_way,
        parallel.recompute,
    )
    logits = capacity * arch.language.vocab_size / tensor * _LOGIT if chunk.has_head else 0.0
    return 2 * (vision * tiles * arch.vision.tokens + language * capacity) + logits


def _kept(layer: tuple[float, float], width: int, layers: int, packs: int, recompute: str) -> float:
    """Numbers that the layers of a chunk keep for each token of the packs under way; none are where there is no backward pass.

    Recomputed layers keep their input, and one of them at a time is there whole, as is one that keeps nothing.
    """
    whole, inside = layer
    if not layers:
        return 0.0
    if not packs or recompute == "full":
        return whole + width * layers * packs
    if recompute == "selective":
        return (whole - inside) * layers * packs + inside
    return whole * layers * packs


def vision_layer(arch: Architecture, tensor: int) -> tuple[float, float]:
    """Numbers that a layer of the vision encoder keeps for each token, and those inside its MLP.

    Whole on every rank: inputs and results of both norms, and both branches before their scale (6 D). Shared: queries, keys, values and
    what attention gives (4 D), the MLP's inside before and after GELU (2 M).
    """
    width, inner = arch.vision.hidden_size, 2 * arch.vision.ffn_hidden_size / tensor
    return 6 * width + 4 * width / tensor + inner, inner


def language_layer(arch: Architecture, tensor: int, sequence_parallel: bool) -> tuple[float, float]:
    """Numbers that a layer of the language model keeps for each token, and those inside its MLP.

    Inputs and results of both norms (4 D) are whole on every rank, or shared with sequence parallelism. Shared: queries, keys, values, what
    attention gives, and the MLP's gate, its other half and their product (3 M). Queries and keys that are normalised are there twice.
    """
    language = arch.language
    width = language.hidden_size
    queries, keys = (count * language.head_size for count in (language.num_attention_heads, language.num_query_groups))
    attention = 2 * queries + 2 * keys + (queries + keys) * language.qk_norm
    inner = 3 * language.ffn_hidden_size / tensor
    return 4 * width / (tensor if sequence_parallel else 1) + attention / tensor + inner, inner
