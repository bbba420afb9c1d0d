"""The noun between encoding and packing: the tokens of one record with its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image as stored: encoded bytes and the tile grid chosen for it.

    Args:
        encoded: content of the image file (JPEG, PNG, ...), unchanged.
        width: width in pixels, as in the file's header.
        height: height in pixels, as in the file's header.
        columns: tiles beside each other in the grid.
        rows: tiles above each other in the grid.
        tiles: tiles that the vision encoder sees; counts the thumbnail. 0: it reads this frame of a
            video together with the one before, whose grid it has.
        frames: of a video whose frames are one image in the text: this one and those behind it; 0:
            an image by itself.
        interval: of such a frame: seconds from a pair of frames to the next.
        name: of the file, for messages; not stored.
        deep: whether the file has more than 8 bits a channel; not stored.
        turned: whether EXIF says that its pixels are not stored upright; not stored.
    """

    encoded: bytes
    width: int
    height: int
    columns: int
    rows: int
    tiles: int
    frames: int = 0
    interval: float = 0.0
    name: str = ""
    deep: bool = False
    turned: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Tokens of one record, ready to pack.

    Args:
        tokens: int32 [n].
        supervised: bool [n], True where the token has a loss.
        images: in the order of their features in ``tokens``.
        source: number of the source in the manifest's list of sources, from 0.
        line: line in the source's annotation file, from 1.
        difficulty: for a curriculum; what is packed does not depend on it, only where.
        unread: keys of the record that were not read; not stored.
        window: index of the part of a document that is cut, from 0; not stored.
        instruction: int32 [m], what a Q-Former reads beside the images, in the tokens of its own
            tokenizer; empty: it reads none.
        rejected: the same conversation with an answer that is not preferred to this one's, whose
            placeholder tokens mean the images of this one; it has no images, no instruction and no
            ``rejected`` of its own. None: a sample alone.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    images: tuple[Image, ...]
    source: int
    line: int
    difficulty: float = 0.0
    unread: tuple[str, ...] = ()
    window: int = 0
    instruction: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    rejected: Sample | None = None

    @property
    def answers(self) -> tuple[Sample, ...]:
        """The samples that a pack holds of it, side by side: itself, and the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def length(self) -> int:
        """Number of tokens, without the rejected answer's."""
        return len(self.tokens)

    def extent(self, alignment: int) -> int:
        """Return the tokens from its start in a pack to its end, where each of its ``answers``
        starts at a multiple of ``alignment``.
        """
        return extent([answer.length for answer in self.answers], alignment)

    @property
    def tiles(self) -> int:
        """Tiles of all images, thumbnails counted."""
        return sum(image.tiles for image in self.images)


def extent(lengths: Sequence[int], alignment: int) -> int:
    """Return the tokens from the start of the first of some samples side by side to the end of the
    last, where each starts at a multiple of ``alignment``.
    """
    *others, last = lengths
    return sum(-(-length // alignment) * alignment for length in others) + last
