"""Random numbers that belong to a pack, whatever the layout.

Philox (J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed by the
seed and counts from the position; each kind has a counter of its own.
"""

from __future__ import annotations

import numpy as np


def drop_path_draws(seed: int, position: int, rows: int, columns: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on the seed and the pack's position alone; float32
    [rows, columns]. They are drawn for the real tiles of the whole pack, so that neither padding
    nor the layout changes them.
    """
    return _generator(seed, position, 0).random((rows, columns), dtype=np.float32)


def pack_draw(seed: int, position: int) -> int:
    """Return a number of 31 bits that depends on the seed and the pack's position alone."""
    return int(_generator(seed, position, 1).integers(2**31))


def next_image_draws(seed: int, position: int, samples: int) -> np.ndarray:
    """Return a uniform number in [0, 1) for each sample of a pack, that depends on the seed and the
    pack's position alone; float64 [samples].
    """
    return _generator(seed, position, 2).random(samples)


def patch_draws(seed: int, position: int, patches: int, tiles: int) -> np.ndarray:
    """Return a uniform number in [0, 1) for each patch of each tile of a pack, that depends on the
    seed and the pack's position alone; float64 [patches, tiles].
    """
    return _generator(seed, position, 3).random((tiles, patches)).T


def _generator(seed: int, position: int, kind: int) -> np.random.Generator:
    """Return the generator of a kind of numbers of a pack."""
    counter = [0, 0, kind, position]
    return np.random.Generator(np.random.Philox(key=seed % 2**64, counter=counter))
