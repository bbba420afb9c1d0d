"""Gated cross-attention layers (Flamingo, arXiv 2204.14198, section 3.1.2), in the form of IDEFICS:
their settings, and how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megavlm.config.pieces import Piece, linear, norm, products, vector


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Blocks of cross-attention and MLP between the layers of a language model, through which its
    tokens read images. Both halves are multiplied by the tanh of a gate.

    Args:
        every: of every so many layers, a block stands before the first; 0: there are no blocks.
        gate: one number a gate (scalar), or one for each of hidden_size (vector).
        gate_start: what fresh gates start from; at 0 the model starts as the language model alone.
        qk_norm: whether the queries and keys of each head are normalised.
    """

    every: int = 0
    gate: Literal["scalar", "vector"] = "scalar"
    gate_start: float = 0.0
    qk_norm: bool = True

    def stands_before(self, layer: int) -> bool:
        """Return whether a block stands before a layer, counted from 0."""
        return self.every > 0 and layer % self.every == 0


def is_cross_attention(key: str) -> bool:
    """Return whether a checkpoint key is one of a block."""
    return ".cross." in key


def pieces(arch: Any, layer: int) -> Iterator[Piece]:
    """Yield the weights of the block before a layer, and its attention, in the order of the forward
    pass. Its heads are as many and as wide as those of the language model's queries. All tokens
    count as reading an image.

    Args:
        arch: ``schema.Architecture``.
        layer: of the language model, counted from 0.
    """
    language = arch.language
    settings = arch.cross_attention
    if not settings.stands_before(layer):
        return
    part = "language"
    key = f"language.decoder.layers.{layer}.cross"
    width = language.hidden_size
    inner = language.ffn_hidden_size
    heads = language.num_attention_heads * language.head_size
    gate = width if settings.gate == "vector" else 1
    has_bias = language.has_layer_norm
    features = arch.features_per_tile
    of_tile = dict(rows=features, unit="tile", has_bias=False)
    yield from norm(f"{key}.norm", part, width, has_bias=has_bias)
    yield from linear(f"{key}.linear_q", part, width, heads, rows=1, unit="token", has_bias=False)
    for name in ("linear_k", "linear_v"):
        yield from linear(f"{key}.{name}", part, arch.memory_size, heads, **of_tile)
    for name in ("query_norm", "key_norm") if settings.qk_norm else ():
        yield from norm(f"{key}.{name}", part, language.head_size, has_bias=False)
    yield products(part, 4 * features * heads, "token")
    yield from linear(
        f"{key}.linear_proj", part, heads, width, rows=1, unit="token", has_bias=False
    )
    yield vector(f"{key}.attention_gate", part, gate)
    yield from norm(f"{key}.mlp_norm", part, width, has_bias=has_bias)
    first = 2 * inner if language.is_gated else inner
    fc1, fc2 = (f"{key}.mlp.linear_{name}" for name in ("fc1", "fc2"))
    yield from linear(fc1, part, width, first, rows=1, unit="token", has_bias=has_bias)
    yield from linear(fc2, part, inner, width, rows=1, unit="token", has_bias=has_bias)
    yield vector(f"{key}.mlp_gate", part, gate)


def memory_rows(arch: Any, tiles: float) -> int:
    """Return the rows as wide as the language model that the features of tiles fill; 0 if no layer
    reads them.
    """
    if not arch.cross_attention.every:
        return 0
    elements = tiles * arch.features_per_tile * arch.memory_size
    return math.ceil(elements / arch.language.hidden_size)


def problems(arch: Any) -> Iterator[str]:
    """Yield what is wrong with the blocks of a model."""
    flag = "--architecture.cross_attention.every"
    settings = arch.cross_attention
    if settings.every < 0:
        yield f"{flag} {settings.every}: must be 0 or more"
    if settings.every <= 0:
        return
    if arch.objective != "next_token":
        why = "has no tokens that read images"
        if arch.needs.has_vocabulary_head:
            why = "has not been tried with it"
        yield (
            f"{flag} {settings.every}: --architecture.objective {arch.objective} {why}; use"
            " next_token, or 0"
        )
    if settings.every > max(arch.language.num_layers, 1):
        yield (
            f"{flag} {settings.every}: --architecture.language.num_layers is"
            f" {arch.language.num_layers}; use at most that"
        )
