"""What takes the place of a pack that cannot be read."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.blend import BlendedDataset
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rank_slice import RankSlice
from tests.data.samples import make_dataset


@pytest.mark.parametrize(
    "facts",
    [dict(), dict(instruction_length=5), dict(features_per_tile=1)],
    ids=["plain", "instructions", "media"],
)
def test_what_takes_the_place_of_a_pack_is_padding_on_every_rank(tmp_path, facts):
    make_dataset(tmp_path, capacity=256, alignment=4, **facts)
    dataset = PackedDataset(tmp_path, next_image=0.5)
    for rank in range(2):
        own = RankSlice(tile_rank=rank, tile_ranks=2, context_rank=rank, context_ranks=2)
        options = BatchOptions(
            vision_layers=2, patches=(9, 4), tile_multiple=4, seed=3, rank_slice=own
        )
        blank = dataset.blank(3, 17, options)
        like = dataset.batch(3, 17, options)
        assert blank.is_padding.all() and not blank.loss_weights.any() and blank.weight_sum == 0
        assert blank.tokens.shape == like.tokens.shape and len(blank.loss_positions) >= 1
        assert blank.sample_ends.tolist() == [0, 256] and blank.samples == 0
        assert len(blank.tiles) == 4 and not blank.tiles.any() and blank.num_features == 0
        assert blank.kept_patches.shape == (4, 4) and blank.drop_path_draws.shape == (4, 4)
        assert len(blank.feature_positions) == 0 and (blank.pack_id, blank.draw) == (3, like.draw)
        for name in ("media", "instructions", "prefixes"):
            assert type(getattr(blank, name)) is type(getattr(like, name))
    second = BlendedDataset([dataset, dataset]).blank(len(dataset) + 3, 17, options)
    assert second == dataclasses.replace(blank, pack_id=len(dataset) + 3)
