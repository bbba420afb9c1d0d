"""Random numbers of a pack stay what they were, since a run may go on in another version."""

from __future__ import annotations

import numpy as np

from megavlm.data.loading.draws import (
    drop_path_draws,
    next_image_draws,
    pack_draw,
    patch_draws,
)

SEED = 5
POSITION = 7


def test_numbers_are_fixed_for_all_time() -> None:
    paths = drop_path_draws(SEED, POSITION, 1, 2)
    images = next_image_draws(SEED, POSITION, 2)
    patches = patch_draws(SEED, POSITION, 2, 2)
    expected = (
        (paths, np.float32, [[0.25435084, 0.7629591]]),
        (images, np.float64, [0.25407579, 0.34237629]),
        (patches, np.float64, [[0.46829786, 0.37691169], [0.77094953, 0.84602203]]),
    )
    for found, dtype, numbers in expected:
        assert found.dtype == dtype
        np.testing.assert_allclose(found, numbers, rtol=1e-6)
    assert pack_draw(SEED, POSITION) == 1590462544


def test_patches_of_a_tile_do_not_depend_on_the_tiles_behind_it() -> None:
    assert np.array_equal(
        patch_draws(SEED, POSITION, 9, 5)[:, :3], patch_draws(SEED, POSITION, 9, 3)
    )


def test_all_numbers_depend_on_seed_and_position() -> None:
    for other in ((SEED + 1, POSITION), (SEED, POSITION + 1), (-1, POSITION), (SEED, 10**15)):
        assert pack_draw(*other) != pack_draw(SEED, POSITION)
        assert not np.intersect1d(next_image_draws(*other, 8), next_image_draws(5, 7, 8)).size
        assert not np.intersect1d(patch_draws(*other, 4, 2), patch_draws(5, 7, 4, 2)).size
