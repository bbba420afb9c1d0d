"""Where to cut the pipeline: the borders that make its slowest chunk as fast as can be.

A pipeline goes at the pace of its slowest chunk. How long a layer takes depends on the freeze mask: a frozen layer has no weight gradient,
and one with nothing trained before it no backward pass at all; on the data, since vision layers grow with the tiles and language layers
with the tokens; and not least on what goes with it, the head above all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from megavlm.config.schema import Architecture
from megavlm.parallel.cost import Piece, pieces, with_gradients


@dataclass(frozen=True, kw_only=True)
class PackSize:
    """What a pack holds, on average.

    Args:
        tokens: of all samples.
        squared_lengths: sum over the samples of the square of their tokens.
        tiles: real tiles.
    """

    tokens: float
    squared_lengths: float
    tiles: float

    @classmethod
    def mean(cls, records: np.ndarray) -> PackSize:
        """Mean of packs, from their records in the index."""
        return cls(**{field.name: float(records[field.name].mean()) for field in fields(cls)})

    def units(self) -> dict[str, float]:
        """Counts by the units of ``cost.Piece``."""
        return {"token": self.tokens, "squared_length": self.squared_lengths, "tile": self.tiles}


def layer_costs(architecture: Architecture, trainable: Sequence[str], size: PackSize) -> list[float]:
    """FLOPs of forward and backward pass of each layer, vision encoder and language model counted through.

    What stands before a layer of its part (patch embedding, projector and token embedding) counts with the part's first, the head with the
    last.

    Args:
        architecture: the model.
        trainable: freeze mask, as in ``training.trainable``.
        size: of a pack.
    """
    vision, units = architecture.vision.num_layers, size.units()
    costs = [0.0] * (vision + architecture.language.num_layers)
    for piece, passes in with_gradients(pieces(architecture), trainable):
        costs[_layer(piece, vision, len(costs))] += piece.forward * passes * units[piece.unit]
    return costs


def _layer(piece: Piece, vision_layers: int, layers: int) -> int:
    """The layer that a piece goes with."""
    if piece.layer is not None:
        return piece.layer + (vision_layers if piece.part == "language" else 0)
    return {"vision": 0, "projector": vision_layers, "language": vision_layers, "head": layers - 1}[piece.part]


def balance(costs: Sequence[float], chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, such that the costliest chunk costs least, and among those the squares of all sum up to least.

    Args:
        costs: of each layer.
        chunks: how many; at most as many as layers.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[end]: (costliest chunk, sum of squares, borders) for the layers before ``end`` in the chunks so far.
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())] + [None] * len(costs)
    for _ in range(chunks):
        best = [_best_ending_at(end, best, sums) for end in range(len(costs) + 1)]
    found = best[-1]
    if found is None:
        raise ValueError(f"{chunks} chunks for {len(costs)} layers")
    borders = (0, *found[2])
    return tuple(end - start for start, end in zip(borders, borders[1:], strict=False))


def _best_ending_at(
    end: int, before: Sequence[tuple[float, float, tuple[int, ...]] | None], sums: Sequence[float]
) -> tuple[float, float, tuple[int, ...]] | None:
    found = None
    for start in range(end):
        if (earlier := before[start]) is not None:
            cost = sums[end] - sums[start]
            candidate = max(earlier[0], cost), earlier[1] + cost * cost, (*earlier[2], end)
            found = candidate if found is None else min(found, candidate)
    return found
