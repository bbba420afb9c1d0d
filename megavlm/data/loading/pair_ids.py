"""Which pairs share an image, or a text."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from megavlm.data.store.reader import Pack


def pair_ids(pack: Pack) -> np.ndarray:
    """Return a number for the image and one for the text of each pair of a pack, int64 [N, 2]:
    hashes of the bytes of the image's file, and of the tokens.

    Args:
        pack: with its images, one for each sample, or none: they then are the same.
    """
    ends = np.cumsum(pack.lengths, dtype=np.int64)
    texts = np.split(np.asarray(pack.tokens), ends[:-1])
    images = [pack.image(index) if pack.tiles else b"" for index in range(len(texts))]
    found = [
        (_hash(image), _hash(text.tobytes())) for image, text in zip(images, texts, strict=True)
    ]
    return np.array(found, np.int64).reshape(-1, 2)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
