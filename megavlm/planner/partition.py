"""Where to cut the pipeline: stage boundaries that minimise the cost of its slowest chunk.

A pipeline is as fast as its slowest chunk. How long a layer takes depends on the freeze mask:
a frozen layer has no weight gradient, and one with nothing trained before it no backward pass at
all; on the data, since vision layers grow with the tiles and language layers with the tokens; on
what is computed again; and not least on what goes with it, the head above all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np

from megavlm.config.schema import LAYER_PARTS, Architecture, Config
from megavlm.planner.flops import Piece, pieces, with_gradients

TYPICAL_IMAGE = 400
"""Tiles of an image whose patches all see each other, where nothing is known of the data: a
photograph of 640 x 480 pixels has 23 x 17 tiles of 28 pixels.
"""


@dataclass(frozen=True, kw_only=True)
class PackSize:
    """What a pack holds, on average.

    Args:
        tokens: of all samples.
        squared_lengths: sum over the samples of the square of their tokens.
        tiles: real tiles.
        squared_tiles: sum over the images of the square of their tiles.
        supervised: tokens that have a loss; none: all.
    """

    tokens: float
    squared_lengths: float
    tiles: float
    squared_tiles: float = 0.0
    supervised: float | None = None

    def __str__(self) -> str:
        """As people read it: the mean length is that of the sample that a token is in."""
        return (
            f"{self.tokens:,.0f} tokens (in samples of"
            f" {self.squared_lengths / max(self.tokens, 1):,.0f}) and {self.tiles:,.1f} tiles"
        )

    @classmethod
    def mean(cls, records: np.ndarray) -> PackSize:
        """Mean of packs, from their records in the index."""
        return cls(**{field.name: float(records[field.name].mean()) for field in fields(cls)})

    def seen_by_head(self, head_tokens: str) -> PackSize:
        """Count as supervised what the head runs on, as ``training.head_tokens`` says."""
        return self if head_tokens == "supervised" else replace(self, supervised=None)

    def units(self) -> dict[str, float]:
        """Count by the units of ``flops.Piece``."""
        return {
            "token": self.tokens,
            "supervised": self.tokens if self.supervised is None else self.supervised,
            "squared_length": self.squared_lengths,
            "tile": self.tiles,
            "squared_tile": self.squared_tiles,
        }


def layer_costs(
    architecture: Architecture,
    trainable: Sequence[str],
    size: PackSize,
    recompute: str = "none",
    recompute_parts: tuple[str, ...] = LAYER_PARTS,
) -> list[float]:
    """FLOPs of forward and backward pass of each layer, vision encoder and language model counted
    through.

    What stands before a layer of its part (patch embedding, connector and token embedding) counts
    with the part's first, the head with the last.

    Args:
        architecture: the model.
        trainable: freeze mask, as in ``training.trainable``; empty: the forward pass alone.
        size: of a pack.
        recompute, recompute_parts: what the backward pass computes again, as in ``parallel``.
    """
    return list(_layer_costs(architecture, tuple(trainable), size, recompute, recompute_parts))


def run_costs(config: Config, size: PackSize) -> list[float]:
    """FLOPs of each layer of a run for a pack, as ``layer_costs`` counts them."""
    return layer_costs(
        config.architecture,
        config.training.trainable,
        size.seen_by_head(config.training.head_tokens),
        config.parallel.recompute,
        config.parallel.recompute_parts,
    )


@lru_cache(maxsize=64)
def _layer_costs(
    architecture: Architecture,
    trainable: tuple[str, ...],
    size: PackSize,
    recompute: str,
    recompute_parts: tuple[str, ...],
) -> tuple[float, ...]:
    vision = architecture.vision.num_layers
    units = size.units()
    costs = [0.0] * (vision + architecture.language.num_layers)
    again = [0.0] * len(costs)
    has_backward = [False] * len(costs)
    for piece, passes in with_gradients(pieces(architecture), trainable):
        layer = layer_of(piece, vision, len(costs))
        forward = piece.forward * units[piece.unit]
        costs[layer] += forward * passes
        if piece.layer is not None:
            has_backward[layer] |= passes > 1
            is_again = recompute == "full" or (recompute == "selective" and ".mlp." in piece.key)
            if is_again and piece.part in recompute_parts:
                again[layer] += forward
    return tuple(
        cost + extra if backward else cost
        for cost, extra, backward in zip(costs, again, has_backward, strict=True)
    )


def layer_of(piece: Piece, vision_layers: int, layers: int) -> int:
    """Return the layer, counted through both models, that a piece is placed with."""
    if piece.layer is not None:
        return piece.layer + (vision_layers if piece.part == "language" else 0)
    connected = min(vision_layers, layers - 1)  # without a language model the last layer of vision
    return {"vision": 0, "connector": connected, "language": connected, "head": layers - 1}[
        piece.part
    ]


def balance(costs: Sequence[float], chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, such that the costliest chunk costs least, and among those the squares
    of all sum up to least.

    Args:
        costs: of each layer.
        chunks: how many; at most as many as layers.

    Raises:
        ValueError: there are more chunks than layers.
    """
    found = _best_by_end(tuple(costs), chunks)[-1]
    if found is None:
        raise ValueError(f"{chunks} chunks for {len(costs)} layers")
    boundaries = (0, *found[2])
    return tuple(end - start for start, end in zip(boundaries, boundaries[1:], strict=False))


_Best = tuple[float, float, tuple[int, ...]]


@lru_cache(maxsize=1024)
def _best_by_end(costs: tuple[float, ...], chunks: int) -> list[_Best | None]:
    """For every end the best way to cut the layers before it: costliest chunk, sum of squares,
    boundaries.
    """
    if chunks == 0:
        return [(0.0, 0.0, ())] + [None] * len(costs)
    before = _best_by_end(costs, chunks - 1)
    sums = [0.0, *accumulate(costs)]
    return [_best_ending_at(end, before, sums) for end in range(len(costs) + 1)]


def _best_ending_at(
    end: int, before: Sequence[_Best | None], sums: Sequence[float]
) -> _Best | None:
    found = None
    for start in range(end - 1, -1, -1):
        cost = sums[end] - sums[start]
        if found is not None and cost > found[0]:
            break  # and it grows
        if (earlier := before[start]) is not None:
            candidate = max(earlier[0], cost), earlier[1] + cost * cost, (*earlier[2], end)
            found = candidate if found is None else min(found, candidate)
    return found
