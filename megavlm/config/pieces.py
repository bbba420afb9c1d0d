"""What a model's cost is made of: its weights, and the products of attention, which have none.

FLOPs of the forward pass are in proportion to a count of the data: tiles, tokens, supervised
tokens, or the sum of the samples' squared lengths or of the images' squared tiles.
``megavlm/planner`` counts pieces; connectors (``megavlm/config/connectors.py``) name their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["tile", "token", "supervised", "squared_length", "squared_tile"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A weight, or the products of attention, which have none.

    Args:
        key: checkpoint key of the weight; empty for attention.
        part: vision, connector, language or head.
        elements: of the weight.
        forward: FLOPs of the forward pass, for each unit; of an expert the mean over all tokens,
            most of which it does not see.
        unit: count of the data that the cost is in proportion to.
        layer: number of its layer inside the part; none where it stands before or after the layers.
        is_matrix: whether it has two dimensions; biases, norms and scales have one.
        expert: number of the expert of the layer that it belongs to; none: it is of no expert.
    """

    key: str
    part: str
    elements: int
    forward: float
    unit: Unit
    layer: int | None = None
    is_matrix: bool = False
    expert: int | None = None


def table(key: str, part: str, rows: int, columns: int) -> Piece:
    """Return a matrix that no product reads, such as an embedding."""
    return replace(vector(key, part, rows * columns), is_matrix=True)


def vector(key: str, part: str, size: int) -> Piece:
    """Return a bias, a norm's weight or the like, which no product reads."""
    return Piece(key=key, part=part, elements=size, forward=0, unit="token")


def products(part: str, forward: int, unit: Unit) -> Piece:
    """Return the products of an attention, which have no weight."""
    return Piece(key="", part=part, elements=0, forward=forward, unit=unit)


def linear(
    key: str, part: str, inputs: int, outputs: int, *, rows: int, unit: Unit, has_bias: bool
) -> Iterator[Piece]:
    """Yield a linear layer that is applied to ``rows`` rows for each unit."""
    yield Piece(
        key=f"{key}.weight",
        part=part,
        elements=inputs * outputs,
        forward=2 * inputs * outputs * rows,
        unit=unit,
        is_matrix=True,
    )
    if has_bias:
        yield vector(f"{key}.bias", part, outputs)


def norm(key: str, part: str, size: int, *, has_bias: bool, joint: str = ".") -> Iterator[Piece]:
    """Yield the weight of a norm and, if it has one, its bias."""
    yield vector(f"{key}{joint}weight", part, size)
    if has_bias:
        yield vector(f"{key}{joint}bias", part, size)
