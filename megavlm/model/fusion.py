"""Putting features where their placeholder tokens stand, or behind the tokens as rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megavlm.config.architecture import Architecture
from megavlm.data.loading.batch import Batch, Mixed


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
    placed = embeddings.index_copy(
        0, batch.feature_positions, features.index_select(0, batch.feature_numbers)
    )
    if batch.mixed is None:
        return placed
    return placed.index_copy(0, batch.mixed.positions, mix(features, batch.mixed))


def mix(features: Tensor, mixed: Mixed) -> Tensor:
    """Return weighted sums of features [I * F, 1, D]: [M, 1, D], computed in float32."""
    # One after the other, so that no tensor is four times as long.
    parts = (
        features.index_select(0, numbers).float() * weights[:, None, None]
        for numbers, weights in zip(mixed.numbers.T, mixed.weights.T, strict=True)
    )
    return sum(parts).to(features.dtype)


def make_newline(architecture: Architecture, dtype: torch.dtype) -> nn.Parameter | None:
    """Make the embedding that ends each row of an image's features [D]; none if the connector has
    none.
    """
    if not architecture.connector.newline:
        return None
    return nn.Parameter(torch.zeros(architecture.language.hidden_size, dtype=dtype))


def place_newlines(embeddings: Tensor, newline: Tensor, batch: Batch) -> Tensor:
    """Put the embedding of the end of a row [D] where rows end, in embeddings [T, 1, D]. It gets a
    gradient, of zero, from packs without rows too.
    """
    places = batch.newline_positions
    # Expanded, not indexed: its gradient is then one sum, in the same order on every rank.
    rows = newline.to(embeddings.dtype).expand(len(places), 1, -1)
    return embeddings.index_copy(0, places, rows)


def as_rows(features: Tensor, rows: int, width: int) -> Tensor:
    """Write features of any width as rows of another one, filled up with zeros, so that one tensor
    holds tokens and features: [I * F, 1, M] -> [rows, 1, width].
    """
    flat = features.flatten()
    return pad(flat, (0, rows * width - len(flat))).view(rows, 1, width)


def from_rows(rows: Tensor, features: int, width: int) -> Tensor:
    """Read features [I * F, 1, M] out of what ``as_rows`` made of them."""
    return rows.flatten()[: features * width].view(features, 1, width)
