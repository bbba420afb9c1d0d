"""The training loss: a weighted sum over tokens, divided by the weight of the whole step."""

from __future__ import annotations

from torch import Tensor


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of the tokens' losses times their weights.

    Args:
        losses: [T]
        weights: [T], 0 where a token is not supervised.

    Returns:
        scalar, float32
    """
    return (losses.float() * weights).sum()
