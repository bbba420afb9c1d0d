"""Images as tokens: one context token for each feature, and a token behind each row of tiles where
a model has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megavlm.data.text.tokenizer import ImageTokens


class Shown(NamedTuple):
    """What an image takes up in the text: its context tokens, and rows of equally many of them if a
    token stands behind each row. The frames of a video may be one image there, of several
    ``images``.
    """

    features: int
    rows: int = 1
    images: int = 1


def expand(
    tokens: np.ndarray,
    supervised: np.ndarray,
    shown: Sequence[Shown],
    context: int,
    newline: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Put an image's tokens in the place of its one context token.

    Args:
        tokens: int32 [t], with one context token for each image.
        supervised: bool [t].
        shown: of each image.
        context: id of the context token.
        newline: id of the token behind each row of an image; None: there is none.

    Returns:
        Tokens and mask; no token of an image is supervised.
    """
    is_image = tokens == context
    repeats = np.ones(len(tokens), np.int64)
    repeats[is_image] = [one.features for one in shown]
    if newline is None:
        return np.repeat(tokens, repeats), np.repeat(supervised, repeats)
    repeats[is_image] += np.array([one.rows for one in shown], np.int64)
    found = np.repeat(tokens, repeats)
    places = np.cumsum(repeats)[is_image]
    for end, one in zip(places, shown, strict=True):
        width = one.features // one.rows + 1
        found[end - one.rows * width + width - 1 : end : width] = newline
    return found, np.repeat(supervised, repeats)


def extents(
    tokens: np.ndarray,
    images: ImageTokens,
    shown: Sequence[Shown],
    context: int,
    newline: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the images of a sample's tokens begin and end, int64 [images] each, with the
    tokens before and after their features.

    Args:
        tokens: int32 [T].
        images: the tokens of images.
        shown: of each image.
        context, newline: as for ``expand``.
    """
    of_images = tokens == context
    newlines = newline is not None
    if newlines:
        of_images |= tokens == newline
    lengths = np.array([one.features + newlines * one.rows for one in shown], np.int64)
    behind = np.cumsum(lengths)
    places = np.flatnonzero(of_images)
    starts = places[behind - lengths] - bool(images.start)
    return starts, places[behind - 1] + 1 + bool(images.end)
