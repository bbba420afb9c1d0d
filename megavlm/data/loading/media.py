"""Which tokens of a pack read which image by cross-attention (Flamingo, arXiv 2204.14198, section
3.1.3): the last image at or before them in the same sample, or the next if there is one, as the
processor of IDEFICS has them.
"""

from __future__ import annotations

import numpy as np

from megavlm.config.tiling import ANY_SIZE
from megavlm.data.loading.batch import Media
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Pack


def images_read(
    tokens: np.ndarray,
    lengths: np.ndarray,
    context_token_id: int,
    end_token_id: int,
    reads_next: np.ndarray | None = None,
) -> np.ndarray:
    """Find the image that each stored token of a pack reads.

    Args:
        tokens: int [t], the stored tokens.
        lengths: int [N], those of each sample.
        context_token_id: of the one token that stands for an image.
        end_token_id: of the token that ends a text; those behind it read no image until the next;
            -1: there is none.
        reads_next: bool [N], the samples whose tokens read the first image at or behind them
            instead, in the same text; tokens without one read as usual, so that no caption or
            answer loses its image. None: no sample's tokens do.

    Returns:
        int64 [t], the number of the image in the pack; -1: none.
    """
    count = len(tokens)
    places = np.arange(count)
    is_image = tokens == context_token_id
    last_image = np.maximum.accumulate(np.where(is_image, places, -1))
    start = np.repeat(np.cumsum(lengths, dtype=np.int64) - lengths, lengths)
    is_end = (tokens == end_token_id) if end_token_id >= 0 else np.zeros(count, bool)
    last_end = np.maximum.accumulate(np.where(is_end, places, -1))
    ended = np.append(-1, last_end[:-1])  # the token that ends a text still reads its image
    reads = (last_image >= start) & (ended < last_image)
    found = np.where(reads, np.cumsum(is_image) - 1, -1)
    if reads_next is None or not reads_next.any():
        return found
    # The same from the end, where the token that ends a text belongs to what stands before it.
    backwards = images_read(tokens[::-1], lengths[::-1], context_token_id, -1)[::-1]
    following = np.where(backwards >= 0, is_image.sum() - 1 - backwards, -1)
    next_image = np.minimum.accumulate(np.where(is_image, places, count)[::-1])[::-1]
    next_end = np.minimum.accumulate(np.where(is_end, places, count)[::-1])[::-1]
    has_next = np.repeat(reads_next, lengths) & (following >= 0) & (next_image <= next_end)
    return np.where(has_next, following, found)


def find_media(
    pack: Pack,
    manifest: Manifest,
    rows: np.ndarray,
    reads_next: np.ndarray | None = None,
) -> Media | None:
    """Find which of a rank's tokens read which image of a pack; none unless an image has one
    placeholder token, as a tile of an image of any size also has. ``reads_next`` as for
    ``images_read``, ``rows`` as for ``group_by_image``.
    """
    if manifest.features_per_tile != 1 or manifest.tiling in ANY_SIZE:
        return None
    words = (manifest.context_token_id, manifest.end_token_id)
    read = images_read(pack.tokens, pack.lengths, *words, reads_next)
    return group_by_image(read, rows)


def group_by_image(read: np.ndarray, rows: np.ndarray) -> Media:
    """Group a rank's tokens by the image that they read.

    Args:
        read: int64 [t], the image of each stored token of the whole pack, ascending as
            ``images_read`` finds them; -1: none.
        rows: int64 [t], where each stored token is among the rank's tokens; -1: nowhere.
    """
    is_reading = (read >= 0) & (rows >= 0)
    images, sizes = np.unique(read[is_reading], return_counts=True)
    is_real = len(images) > 0
    if not is_real:
        images = np.zeros(1, np.int64)
        sizes = np.ones(1, np.int64)
    return Media.of(
        rows=rows[is_reading] if is_real else np.zeros(1, np.int64),
        ends=np.append(0, np.cumsum(sizes)).astype(np.int32),
        images=images,
        image_ends=np.arange(len(images) + 1, dtype=np.int32),
        lengths=tuple(sizes.tolist()),
        is_real=is_real,
    )
