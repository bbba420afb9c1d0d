"""Which weights a rank holds: numbers of each layer, as tensor parallelism cuts them.

Vectors that no rank can cut (norms, scales, biases that are added after a sum over the ranks) and
the patch embedding are whole on every rank; matrices, and biases before such a sum, are cut.
Vocabulary and heads are padded so that they divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megavlm.config.freeze_mask import matches
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import Piece, pieces
from megavlm.planner.layout import Chunk
from megavlm.planner.padding import padded_heads, padded_vocabulary
from megavlm.planner.partition import layer_of

_CUT = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "linear_proj.weight",
    "linear_fc2.weight",
)
_CUT += ("qk_norm.query", "qk_norm.key", "word_embeddings.weight", "output_layer.weight")
_BY_HEADS = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "qk_norm.query",
    "qk_norm.key",
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Numbers that a rank holds.

    Args:
        weights: in all tensors.
        trained: in those that are trained.
        trained_copies: of these, in tensors that each tensor-parallel rank has whole, for tiles of
            its own.
        in_fp8: elements of weights that have FP8 copies.
    """

    weights: int = 0
    trained: int = 0
    trained_copies: int = 0
    in_fp8: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(
            weights=self.weights + other.weights,
            trained=self.trained + other.trained,
            trained_copies=self.trained_copies + other.trained_copies,
            in_fp8=self.in_fp8 + other.in_fp8,
        )


def held_by(config: Config, chunk: Chunk) -> Held:
    """Count the parameters of a chunk on one rank."""
    found = _places(_cut_by(config), chunk.places(config.architecture.vision.num_layers))
    # A tied head that stands without the token embedding has a copy of it.
    return (
        found + _embedding(config)
        if chunk.has_head and not chunk.has_connector and config.architecture.language.tied_head
        else found
    )


def copied_head(config: Config, chunks: tuple[Chunk, ...]) -> int:
    """Numbers of a tied head on a rank, where it is a copy whose gradient is summed with that of
    the token embedding; else 0.
    """
    last = chunks[-1]
    return (
        _embedding(config).trained
        if config.architecture.language.tied_head and not last.has_connector
        else 0
    )


def is_trained(piece: Piece, trainable: tuple[str, ...]) -> bool:
    """Whether a freeze mask trains a weight."""
    return any(matches(piece.key, pattern) for pattern in trainable)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What the numbers depend on.

    Args:
        arch: the model.
        trainable: freeze mask.
        vision, language: ranks that share the layers of each part.
        fp8: parts whose layers have an FP8 recipe.
    """

    arch: Architecture
    trainable: tuple[str, ...]
    vision: int
    language: int
    fp8: tuple[str, ...] = ()


def _cut_by(config: Config) -> _Cut:
    parallel = config.parallel
    return _Cut(
        arch=config.architecture,
        trainable=config.training.trainable,
        vision=parallel.vision_tensor_size,
        language=parallel.tensor_model_parallel_size,
        fp8=tuple(config.fp8.recipes),
    )


def _embedding(config: Config) -> Held:
    piece = next(
        piece
        for piece in pieces(config.architecture)
        if piece.key.endswith("word_embeddings.weight")
    )
    return _held(piece, _cut_by(config))


@lru_cache(maxsize=65536)
def _places(cut: _Cut, places: range) -> Held:
    return sum(_by_layer(cut)[places.start : places.stop], Held())


@lru_cache(maxsize=64)
def _by_layer(cut: _Cut) -> tuple[Held, ...]:
    """Of each layer, with what goes with it."""
    vision = cut.arch.vision.num_layers
    layers = cut.arch.vision.num_layers + cut.arch.language.num_layers
    table = [Held()] * layers
    for piece in pieces(cut.arch):
        if piece.numbers:
            table[layer_of(piece, vision, layers)] += _held(piece, cut)
    return tuple(table)


def _held(piece: Piece, cut: _Cut) -> Held:
    before_language = piece.part in ("vision", "connector")
    ranks = cut.vision if before_language else cut.language
    numbers = piece.numbers
    if piece.key.endswith(("word_embeddings.weight", "output_layer.weight")):
        numbers = cut.arch.language.hidden_size * padded_vocabulary(cut.arch.language.vocab_size)
    elif piece.part == "vision" and piece.key.endswith(_BY_HEADS):
        heads = cut.arch.vision.num_attention_heads
        numbers = numbers // heads * padded_heads(heads, ranks)
    numbers = numbers // ranks if piece.key.endswith(_CUT) else numbers
    trained = numbers if is_trained(piece, cut.trainable) else 0
    is_replicated = before_language and cut.vision < cut.language
    is_product = piece.layer is not None and piece.forward > 0
    return Held(
        weights=numbers,
        trained=trained,
        trained_copies=trained if is_replicated else 0,
        in_fp8=numbers if is_product and piece.part in cut.fp8 else 0,
    )
