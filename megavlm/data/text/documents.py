"""Documents, texts with images anywhere in them, as OpenFlamingo learns them (arXiv 2308.01390)."""

from __future__ import annotations

import numpy as np

from megavlm.data.records.record import IMAGE_PLACEHOLDER


def with_chunk_ends(text: str, end: str) -> str:
    """Put a token behind each chunk of a document: an image, or several side by side, and the text
    up to the next one. White space at images and at ends of chunks goes.
    """
    first, *behind = (part.strip() for part in text.split(IMAGE_PLACEHOLDER))
    found = first
    for part in behind:
        found += IMAGE_PLACEHOLDER + part + (end if part else "")
    return found.removesuffix(end) + end


def learned_behind_image(
    tokens: np.ndarray, supervised: np.ndarray, context_token_id: int
) -> np.ndarray:
    """Return the mask of a document, or of a part of it, without what stands before its first
    image.
    """
    return supervised & np.logical_or.accumulate(tokens == context_token_id)
