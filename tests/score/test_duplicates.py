"""Near-duplicates are those that a comparison by brute force finds, by the documented rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.score import duplicates
from megavlm.score.duplicates import hash_bits, hashes, mark_near_duplicates


def embeddings(count: int) -> np.ndarray:
    """Return embeddings around one direction, a third of them near an earlier one."""
    rng = np.random.default_rng(4)
    found = rng.standard_normal((count, 24)) + 2.0
    for row in range(1, count):
        if rng.random() < 0.33:
            found[row] = found[rng.integers(row)] + 0.25 * rng.standard_normal(24)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16)


def earlier_near(images: np.ndarray, threshold: float) -> np.ndarray:
    """Return which image is near which earlier one, bool [n, n]."""
    wide = images.astype(np.float32)
    return np.tril(wide @ wide.T >= threshold, -1)


def marked_by(images: np.ndarray, threshold: float, folder: Path) -> np.ndarray:
    marked = np.zeros(len(images), bool)
    mark_near_duplicates(images, threshold, marked, folder / "codes")
    assert not list(folder.iterdir())
    return marked


@pytest.mark.parametrize("threshold", [0.97, 0.99, 1.0])
def test_few_images_are_all_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 37)
    images = embeddings(300)
    expected = earlier_near(images, threshold).any(axis=1)
    assert np.array_equal(marked_by(images, threshold, tmp_path), expected)
    assert threshold == 1.0 or 20 < expected.sum() < 250


def test_many_images_are_compared_if_they_share_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = embeddings(700)
    for name, value in (("BUCKET", 32), ("_BLOCK", 16), ("_GATHERED", 100), ("_CHUNK", 64)):
        monkeypatch.setattr(duplicates, name, value)
    bits = hash_bits(len(images))
    assert bits == 5
    rng = np.random.default_rng(0)
    mean = images[:64].astype(np.float32).mean(axis=0)
    shares = np.zeros((700, 700), bool)
    for _ in range(duplicates.TABLES):
        codes = hashes(images, mean, rng.standard_normal((24, bits)).astype(np.float32))
        assert len(np.unique(codes)) > 20
        shares |= codes[:, None] == codes
    near = earlier_near(images, 0.97)
    found = marked_by(images, 0.97, tmp_path)
    assert np.array_equal(found, (near & shares).any(axis=1))
    assert found.sum() > 0.99 * near.any(axis=1).sum() > 100


def test_no_images(tmp_path: Path) -> None:
    assert not len(marked_by(np.zeros((0, 8), np.float16), 0.9, tmp_path))
