"""Putting projected features where their placeholder tokens stand."""

from __future__ import annotations

from torch import Tensor


def place_features(embeddings: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Replace the embeddings of the placeholder tokens by features.

    A pack without images brings the features of one blank tile and no position: nothing is replaced, but the result still depends on the
    features, so that every trained parameter gets a gradient (of zero) and no collective waits for one.

    Args:
        embeddings: [T, 1, D]
        features: [I * F, 1, D], tile by tile.
        positions: [placeholders], ascending.

    Returns:
        [T, 1, D]

    Raises:
        ValueError: features and placeholders are not equal in number.
    """
    count = len(positions)
    if count and count != len(features):
        raise ValueError(f"the pack has {count} image placeholder tokens, but its tiles give {len(features)} features")
    return embeddings.index_copy(0, positions, features[:count])
