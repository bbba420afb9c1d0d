"""Images that were there before: records whose image embedding is near that of an earlier record.

Comparing all pairs of n images takes n * n products. So images are compared only if they share a
hash: the signs of their embeddings, less the mean, along a few random directions (Charikar,
Similarity estimation techniques from rounding algorithms, 2002). Each of ``TABLES`` tables has
directions of its own, as many as make about ``BUCKET`` images share a hash. The rule is exact: a
record counts if the cosine of its embedding and that of any earlier record that shares one of the
hashes reaches the threshold. Of images whose cosine is 0.98, more than 99.9% share one if there are
a million. With at most ``BUCKET`` images all are compared with each other.

Shape letters: n images, E size of the embeddings, B bits of a hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TABLES = 8
BUCKET = 4096
# Images whose mean is taken, and whose hashes are worked out, at once.
_CHUNK = 2**16
# Images of neighbouring hashes that are gathered in one reading of all hashes.
_GATHERED = 2**22
_BLOCK = 4096
# Embeddings are rounded to float16: the cosine of an image with itself is a little less than 1.
_ROUNDED_ONE = 0.999


def hash_bits(images: int) -> int:
    """Return the bits of a hash."""
    return max(0, math.ceil(math.log2(max(1, images) / BUCKET)))


def mark_near_duplicates(
    images: np.ndarray, threshold: float, marked: np.ndarray, codes: Path
) -> None:
    """Mark images that an earlier one is near. What is in memory does not grow with their number,
    beside the arrays, which may be files.

    Args:
        images: embeddings of length one, float16 [n, E], in the order of the records.
        threshold: smallest cosine of images that are near.
        marked: bool [n], false; set here.
        codes: file for the hashes of one table; overwritten.
    """
    bits = hash_bits(len(images))
    mean = np.asarray(images[:_CHUNK], np.float32).mean(axis=0) if len(images) else 0.0
    rng = np.random.default_rng(0)
    for _ in range(TABLES if bits else 1):
        planes = rng.standard_normal((images.shape[1], bits)).astype(np.float32)
        for rows in _buckets(images, mean, planes, codes):
            _mark_bucket(images, rows, threshold, marked)
    codes.unlink(missing_ok=True)


def hashes(images: np.ndarray, mean: np.ndarray | float, planes: np.ndarray) -> np.ndarray:
    """Return the hash of each image, uint32 [n].

    Args:
        images: embeddings [n, E].
        mean: of the images [E].
        planes: directions [E, B].
    """
    signs = (np.asarray(images, np.float32) - mean) @ planes > 0
    weights = (1 << np.arange(planes.shape[1], dtype=np.uint32)).astype(np.uint32)
    return (signs * weights).sum(axis=1, dtype=np.uint32)


def _buckets(
    images: np.ndarray, mean: np.ndarray | float, planes: np.ndarray, path: Path
) -> Iterator[np.ndarray]:
    """Yield the images that share a hash, ascending, for each hash that several have."""
    if not planes.shape[1]:
        yield np.arange(len(images))
        return
    codes = np.memmap(path, np.uint32, "w+", shape=(len(images),))
    counts = np.zeros(2 ** planes.shape[1], np.int64)
    for start in range(0, len(images), _CHUNK):
        found = hashes(images[start : start + _CHUNK], mean, planes)
        codes[start : start + _CHUNK] = found
        counts += np.bincount(found, minlength=len(counts))
    first = 0
    while first < len(counts):
        # As many hashes as have few enough images together, one at least.
        total = np.cumsum(counts[first:])
        end = first + max(1, int(np.searchsorted(total, _GATHERED, side="right")))
        rows = np.concatenate(
            [
                start + np.flatnonzero((part >= first) & (part < end))
                for start in range(0, len(codes), _CHUNK)
                for part in [codes[start : start + _CHUNK]]
            ]
        )
        own = codes[rows]
        rows = rows[np.argsort(own, kind="stable")]
        ends = np.cumsum(counts[first:end])
        yield from (some for some in np.split(rows, ends[:-1]) if len(some) > 1)
        first = end


def _mark_bucket(
    images: np.ndarray, rows: np.ndarray, threshold: float, marked: np.ndarray
) -> None:
    """Mark those of some images that an earlier one of them is near."""
    for start in range(0, len(rows), _BLOCK):
        left = rows[start : start + _BLOCK]
        left = left[~marked[left]]
        queries = np.asarray(images[left], np.float32)
        for other in range(0, start + 1, _BLOCK):
            if not len(left):
                break
            earlier = rows[other : other + _BLOCK]
            near = queries @ np.asarray(images[earlier], np.float32).T >= min(
                threshold, _ROUNDED_ONE
            )
            found = (near & (earlier[None] < left[:, None])).any(axis=1)
            marked[left[found]] = True
            left = left[~found]
            queries = queries[~found]
