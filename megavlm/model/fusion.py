"""Putting projected features where their placeholder tokens stand."""

from __future__ import annotations

from torch import Tensor

from megavlm.data.loading.batch import Batch


def place_features(embeddings: Tensor, features: Tensor, batch: Batch) -> Tensor:
    """Replace the embeddings of the placeholder tokens by features.

    Blank tiles at the end, which fill a batch up to a number of tiles that suits the kernels, have
    no position; nor has the one tile of a pack without images. The result depends on the features
    all the same, so that every trained parameter gets a gradient (of zero) and no collective waits
    for one.

    Args:
        embeddings: of this rank's tokens [T, 1, D].
        features: of the whole pack [I * F, 1, D], tile by tile, those of padding tiles last.
        batch: says which feature goes where.

    Returns:
        [T, 1, D]

    Raises:
        ValueError: there are more placeholders than features.
    """
    if batch.num_features > len(features):
        raise ValueError(
            f"the pack has {batch.num_features} image placeholder tokens, but its tiles give"
            f" {len(features)} features"
        )
    return embeddings.index_copy(
        0, batch.feature_positions, features.index_select(0, batch.feature_numbers)
    )
