"""Where the tokens of a sample stand among frames, rows and columns, by which a language model
rotates queries and keys (M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1).

A text goes on by 1 a token on all three axes. The placeholder tokens of an image stand in one
frame, in the rows and columns of its grid, counted from where the text had come to; what follows
it goes on behind the largest of these numbers. Shapes: t tokens stored, N samples, P placeholder
tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megavlm.data.images.feature_layout import Tiled

AXES = 3
"""Frame, row and column."""


class RotaryPositions(NamedTuple):
    """Where the tokens of a pack stand.

    Args:
        of_tokens: int64 [3, t], frame, row and column of each token in its sample.
        following: int64 [N], where the next token of each sample would stand, on all axes.
    """

    of_tokens: np.ndarray
    following: np.ndarray


def rotary_positions(
    tokens: np.ndarray, lengths: np.ndarray, images: list[Tiled], context_token_id: int
) -> RotaryPositions:
    """Find where the tokens of a pack stand.

    Args:
        tokens: int [t].
        lengths: int [N], tokens of each sample.
        images: in the order of their placeholders, each as often as a sample shows it; one
            placeholder token stands for each tile of their grids, row by row.
        context_token_id: of placeholder tokens.
    """
    grids = np.array([(image.columns, image.rows) for image in images], np.int64).reshape(-1, 2)
    sizes = grids.prod(axis=1)
    placeholders = np.flatnonzero(tokens == context_token_id)
    inside = np.arange(len(placeholders)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = np.repeat(grids[:, 0], sizes)
    # How far each token moves what follows it: an image does with its last token.
    steps = np.ones(len(tokens), np.int64)
    steps[placeholders] = 0
    steps[placeholders[np.cumsum(sizes) - 1]] = grids.max(axis=1)
    ends = np.cumsum(steps)
    lasts = np.cumsum(lengths, dtype=np.int64) - 1
    before = np.append(0, ends[lasts])[:-1]
    starts = ends - steps - np.repeat(before, lengths)
    found = np.tile(starts, (AXES, 1))
    found[1, placeholders] += inside // columns
    found[2, placeholders] += inside % columns
    return RotaryPositions(found, ends[lasts] - before)
