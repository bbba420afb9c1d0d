"""Which feature of a pack's images goes to which token of a rank.

Shapes: t tokens stored, P placeholder tokens of the pack, F features of a tile.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megavlm.data.images.feature_layout import (
    MIXED,
    NEWLINE,
    FeatureLayout,
    mixed_in_pack,
    numbers_in_pack,
)
from megavlm.data.loading.batch import Mixed
from megavlm.data.loading.native_images import Share
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Pack
from megavlm.io.storage import ReadError


def feature_places(
    folder: Path | str,
    pack: Pack,
    manifest: Manifest,
    layout: FeatureLayout,
    positions: np.ndarray,
    local: np.ndarray,
    share: Share | None = None,
) -> dict[str, np.ndarray | Mixed | int | None]:
    """Return where image features and newlines go among a rank's tokens, and which of the pack's
    features these are or are mixed of, int64; and how many the pack has.

    Args:
        folder: of the dataset, for messages.
        pack: the pack.
        manifest: of the dataset.
        layout: which features of an image stand in its text.
        positions: of the stored tokens in the pack [t].
        local: where each token of the pack is among the rank's tokens; -1: nowhere.
        share: says in which order ranks have the tiles; none: in that of the pack.

    Raises:
        ReadError: the pack has other placeholder tokens than its images have.
    """
    features = manifest.features_per_tile
    twice = manifest.preferences
    numbers = numbers_in_pack(pack.images, layout, features, preferences=twice)
    if share is not None:
        numbers = share.features[numbers]
    mixed = mixed_in_pack(pack.images, layout, features, preferences=twice)
    _refuse_other_pairs(folder, pack, manifest)
    found = local[_placeholders(folder, pack, manifest, positions, len(numbers))]
    is_feature = (found >= 0) & (numbers >= 0)
    of_mixed = found[numbers == MIXED]
    is_mixed = of_mixed >= 0
    return dict(
        feature_positions=found[is_feature],
        feature_numbers=numbers[is_feature],
        newline_positions=found[(found >= 0) & (numbers == NEWLINE)],
        num_features=pack.tiles * features,
        mixed=None
        if mixed is None
        else Mixed.of(
            positions=of_mixed[is_mixed],
            numbers=mixed.numbers[is_mixed],
            weights=mixed.weights[is_mixed],
        ),
    )


def _placeholders(
    folder: Path | str, pack: Pack, manifest: Manifest, positions: np.ndarray, expected: int
) -> np.ndarray:
    """Return the positions of the placeholder tokens, int64 [expected]; raises as
    ``feature_places``.
    """
    placeholders = positions[pack.tokens == manifest.context_token_id]
    if len(placeholders) != expected:
        raise ReadError(
            f"{folder}: pack {pack.pack_id} has {len(placeholders)} context tokens (id"
            f" {manifest.context_token_id}), but its {pack.tiles} tiles of"
            f" {manifest.features_per_tile} features need {expected}; pack the dataset again"
        )
    return placeholders


def _refuse_other_pairs(folder: Path | str, pack: Pack, manifest: Manifest) -> None:
    """Raise ReadError if a pack of pairs of an image and its text does not have one tile for each
    sample.
    """
    if manifest.features_per_tile or not pack.tiles:
        return
    owners = np.repeat(pack.images["sample"], pack.images["tiles"])
    if not np.array_equal(owners, np.arange(len(pack.lengths))):
        raise ReadError(
            f"{folder}: pack {pack.pack_id} was packed for pairs, but its {len(pack.lengths)}"
            f" samples have {pack.tiles} tiles, not one each; pack the dataset again"
        )
