"""Places of images along a path on which similar ones stand side by side, from their embeddings:
packs that are filled in this order hold pairs that are hard to tell apart.

The images are halved again and again, at the median of their products with the direction in which
a sample of them varies most, until few are left. That takes n log n products for n images.

Shape letters: n images, E size of the embeddings.
"""

from __future__ import annotations

import numpy as np

# Images that the direction is found from, and that are read at once.
_SAMPLE = 2048
_CHUNK = 2**16
# So few need not be halved any more.
_LEAF = 4


def find_places(images: np.ndarray) -> np.ndarray:
    """Return the place of each image on the path, int64 [n]: each number from 0 once.

    Args:
        images: embeddings of length one, float16 [n, E], which may be a file.
    """
    order = np.arange(len(images), dtype=np.int64)
    # Ranges of the order that are still to be halved.
    left = [(0, len(images))]
    while left:
        start, end = left.pop()
        if end - start <= _LEAF:
            continue
        rows = order[start:end]
        middle = (end - start) // 2
        split = np.argsort(_along(images, rows), kind="stable")
        order[start:end] = rows[split]
        left += [(start, start + middle), (start + middle, end)]
    places = np.empty(len(images), np.int64)
    places[order] = np.arange(len(images))
    return places


def _along(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return where some images lie along the direction in which they vary most, float32 [rows]."""
    step = -(-len(rows) // _SAMPLE)
    some = np.asarray(images[np.sort(rows[::step])], np.float32)
    direction = _main_direction(some - some.mean(axis=0))
    chunks = [
        np.asarray(images[rows[start : start + _CHUNK]], np.float32) @ direction
        for start in range(0, len(rows), _CHUNK)
    ]
    return np.concatenate(chunks)


def _main_direction(some: np.ndarray) -> np.ndarray:
    """Return the direction in which rows vary most, float32 [E], by the smaller of the two products
    of the rows with themselves: most ranges hold far fewer images than embeddings have numbers.

    Args:
        some: less their mean, float32 [rows, E].
    """
    if len(some) < some.shape[1]:
        return np.linalg.eigh(some @ some.T)[1][:, -1] @ some
    return np.linalg.eigh(some.T @ some)[1][:, -1]
