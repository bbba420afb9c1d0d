"""Long documents cut into windows that fit into a pack, as Flamingo trains on interleaved web pages
(arXiv:2204.14198, section 2.4: 256 tokens and 5 images of each page).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How documents, records that are one ``pretrain`` text, are cut.

    Args:
        tokens: most tokens of a window; 0: any number.
        images: most images of a window, of which a video that is one image in the text is one; 0:
            any number.
    """

    tokens: int = 0
    images: int = 0

    @property
    def cut(self) -> bool:
        """Return whether documents are cut at all."""
        return bool(self.tokens or self.images)


def cut_document(
    tokens: np.ndarray, image_starts: np.ndarray, image_ends: np.ndarray, windows: Windows
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the windows of a document, one after the other, as ``(first token, end, first image,
    end)``. The tokens of an image stay together.

    Args:
        tokens: int [T], of the document.
        image_starts, image_ends: int [images], the tokens of each image, markers included.
        windows: what a window may hold; an image with more tokens is a window of its own.
    """
    start = 0
    image = 0
    while start < len(tokens):
        end = len(tokens)
        if windows.tokens:
            end = min(end, start + windows.tokens)
        last = image + int(np.searchsorted(image_starts[image:], end))
        if windows.images and last - image > windows.images:
            last = image + windows.images
            end = int(image_starts[last])
        # Not inside of an image.
        if last > image and image_ends[last - 1] > end:
            last -= 1
            end = int(image_starts[last])
            if end == start:
                last += 1
                end = int(image_ends[last - 1])
        yield start, end, image, last
        start = end
        image = last
