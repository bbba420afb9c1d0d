"""Where the tokens of a sample stand among frames, rows and columns, by which a language model
rotates queries and keys (M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1).

A text goes on by 1 a token on all three axes. The placeholder tokens of an image stand in one
frame, in the rows and columns of its grid, counted from where the text had come to; what follows
it goes on behind the largest of these numbers. A video has several frames, which are pairs of what
was filmed: one after the other, or as far apart as they are in time (Qwen2.5-VL, arXiv 2502.13923,
section 2.1.3). transformers 5 lets a text go on behind rows and columns alone, so that it overlaps
with a long video; the authors' code, vLLM, and transformers 4 do as is done here. Shapes: t tokens
stored, N samples, P placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megavlm.data.images.feature_layout import Tiled, images_in_text

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
    tokens: np.ndarray,
    lengths: np.ndarray,
    images: Sequence[Tiled],
    context_token_id: int,
    tokens_per_second: int,
) -> RotaryPositions:
    """Find where the tokens of a pack stand.

    Args:
        tokens: int [t].
        lengths: int [N], tokens of each sample.
        images: in the order of their placeholders, each as often as a sample shows it; one
            placeholder token stands for each tile of their grids, row by row.
        context_token_id: of placeholder tokens.
        tokens_per_second: how far apart frames a second apart are; 0: one frame is 1 behind the
            other.
    """
    shown = list(images_in_text(images))
    grids = np.array([(group[0].columns, group[0].rows) for group in shown], np.int64)
    columns, rows = grids.reshape(-1, 2).T
    frames = [frame_positions(group, tokens_per_second) for group in shown]
    counts = np.array(list(map(len, frames)), np.int64)
    sizes = columns * rows * counts
    placeholders = np.flatnonzero(tokens == context_token_id)
    inside = np.arange(len(placeholders)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    across = np.repeat(columns, sizes)
    # How far each token moves what follows it: an image does with its last token.
    steps = np.ones(len(tokens), np.int64)
    steps[placeholders] = 0
    extents = [columns, rows, np.array([own[-1] + 1 for own in frames], np.int64)]
    steps[placeholders[np.cumsum(sizes) - 1]] = np.max(extents, axis=0)
    ends = np.cumsum(steps)
    of_samples = ends[np.cumsum(lengths, dtype=np.int64) - 1]
    before = np.append(0, of_samples)[:-1]
    starts = ends - steps - np.repeat(before, lengths)
    found = np.tile(starts, (AXES, 1))
    if len(frames):
        in_frame = np.repeat(columns * rows, counts)
        found[0, placeholders] += np.repeat(np.concatenate(frames), in_frame)
    found[1, placeholders] += inside // across % np.repeat(rows, sizes)
    found[2, placeholders] += inside % across
    return RotaryPositions(found, of_samples - before)


def frame_positions(group: Sequence[Tiled], tokens_per_second: int) -> np.ndarray:
    """Return where the frames of an image in the text stand behind its first, int64 [frames];
    arguments as in ``rotary_positions``.

    Args:
        group: the image, or the frames that were filmed.
        tokens_per_second: as for ``rotary_positions``.
    """
    pairs = np.arange(sum(image.tiles > 0 for image in group))
    if not tokens_per_second:
        return pairs
    # In float32, as transformers computes it.
    step = np.float32(tokens_per_second) * np.float32(group[0].interval)
    return (pairs.astype(np.float32) * step).astype(np.int64)
