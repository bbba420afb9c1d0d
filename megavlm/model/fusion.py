"""Putting projected features where their placeholder tokens stand."""

from __future__ import annotations

from torch import Tensor


def place_features(embeddings: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Replace the embeddings of the placeholder tokens by features.

    Blank tiles at the end, which fill a batch up to a number of tiles that suits the kernels, have no position; nor has the one tile of a
    pack without images. The result depends on the features all the same, so that every trained parameter gets a gradient (of zero) and no
    collective waits for one.

    Args:
        embeddings: [T, 1, D]
        features: [I * F, 1, D], tile by tile, those of blank tiles last.
        positions: [placeholders], ascending.

    Returns:
        [T, 1, D]

    Raises:
        ValueError: there are more placeholders than features.
    """
    count = len(positions)
    if count > len(features):
        raise ValueError(f"the pack has {count} image placeholder tokens, but its tiles give {len(features)} features")
    return embeddings.index_copy(0, positions, features[:count])
