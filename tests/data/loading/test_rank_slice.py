"""The shares of a pack that ranks take: every tile and every token once, and the draws and
positions that go with them.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rank_slice import RankSlice
from tests.data.samples import make_dataset

FEATURES = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("packs") / "train"
    sizes = dict(
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=FEATURES,
        capacity=144,
        alignment=12,
    )
    make_dataset(folder, packs=8, samples_per_pack=4, image_share=0.6, **sizes)
    return PackedDataset(folder)


@pytest.mark.parametrize("tiles", [0, 1, 5, 8, 13])
@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (2, 1), (4, 1), (3, 2), (2, 16)])
def test_tiles_are_shared_out_in_equal_numbers(tiles: int, ranks: int, multiple: int) -> None:
    rank_slices = [
        RankSlice(tile_rank=rank, tile_ranks=ranks).tiles(tiles, multiple) for rank in range(ranks)
    ]
    assert [number for rank_slice in rank_slices for number in rank_slice] == list(
        range(ranks * len(rank_slices[0]))
    )
    assert len(rank_slices[0]) % multiple == 0 and max(1, tiles) <= ranks * len(rank_slices[0])
    assert len(rank_slices[0]) - multiple < max(1, tiles) / ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_belongs_to_one_rank_and_early_and_late_ones_to_each(ranks: int) -> None:
    ends = np.array([0, 12, 48, 60, 72], np.int32)
    rank_slices = [
        RankSlice(context_rank=rank, context_ranks=ranks).tokens(ends) for rank in range(ranks)
    ]
    assert np.array_equal(np.sort(np.concatenate(rank_slices)), np.arange(72))
    # What a token sees, itself included, summed: the work of a rank.
    work = [
        sum(
            place - ends[np.searchsorted(ends, place, side="right") - 1] + 1 for place in rank_slice
        )
        for rank_slice in rank_slices
    ]
    assert len(set(work)) == 1


def test_tokens_are_cut_as_transformer_engine_cuts_them() -> None:
    # The example of its documentation: two samples of 8 and 4 tokens over two ranks.
    ends = np.array([0, 8, 12], np.int32)
    first, second = (
        RankSlice(context_rank=rank, context_ranks=2).tokens(ends).tolist() for rank in range(2)
    )
    assert first == [0, 1, 6, 7, 8, 11] and second == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize(
    ("lengths", "told"), [([8, 6], "[6]"), ([8, 5, 6, 12, 7, 9], "[5, 6, 7]")], ids=["one", "many"]
)
def test_samples_that_cannot_be_cut_are_refused(lengths: list[int], told: str) -> None:
    with pytest.raises(
        ValueError,
        match=(
            rf"samples of {re.escape(told)} tokens .* --parallel.context_parallel_size 2 .*"
            " --alignment 4"
        ),
    ):
        RankSlice(context_rank=0, context_ranks=2).tokens(np.cumsum([0, *lengths]))


@pytest.mark.parametrize("pack_id", range(8))
def test_shares_together_are_the_whole_batch(dataset: PackedDataset, pack_id: int) -> None:
    options = BatchOptions(reduction="square", vision_layers=2, patches=(16, 5), seed=5)
    whole = dataset.batch(pack_id, 11, options)
    places = [
        RankSlice(context_rank=rank, context_ranks=3).tokens(whole.sample_ends.numpy())
        for rank in range(3)
    ]
    rank_slices = [
        dataset.batch(
            pack_id,
            11,
            replace(
                options,
                rank_slice=RankSlice(tile_rank=r, tile_ranks=3, context_rank=r, context_ranks=3),
            ),
        )
        for r in range(3)
    ]
    for rank_slice, own in zip(rank_slices, places, strict=True):
        for name in ("tokens", "labels", "loss_weights"):
            assert torch.equal(getattr(rank_slice, name), getattr(whole, name)[own])
        assert (
            torch.equal(rank_slice.sample_ends, whole.sample_ends)
            and rank_slice.sample_lengths == whole.sample_lengths
            and rank_slice.longest_sample == whole.longest_sample
            and rank_slice.prefixes == whole.prefixes
            and rank_slice.samples == whole.samples
        )
        assert torch.equal(
            torch.from_numpy(own)[rank_slice.feature_positions],
            whole.feature_positions[rank_slice.feature_numbers],
        )
        assert rank_slice.num_features == whole.num_features == len(whole.feature_positions)
    drawn = torch.cat([rank_slice.kept_patches for rank_slice in rank_slices], dim=1)
    assert torch.equal(drawn[:, : whole.kept_patches.shape[1]], whole.kept_patches)
    numbers = torch.cat([rank_slice.feature_numbers for rank_slice in rank_slices])
    assert torch.equal(numbers.sort().values, torch.arange(whole.num_features))
    real = whole.num_features // FEATURES
    for name, dim in (("tiles", 0), ("drop_path_draws", 1)):
        together = torch.cat([getattr(rank_slice, name) for rank_slice in rank_slices], dim)
        assert torch.equal(together.narrow(dim, 0, max(1, real)), getattr(whole, name))


def test_only_images_of_the_share_are_decoded(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megavlm.data.loading import tiles as module

    pack_id = int(np.argmax(dataset.index["tiles"]))
    pack = dataset.reader.read(pack_id)
    decoded = []
    decode = module.decode_tiles
    monkeypatch.setattr(
        module, "decode_tiles", lambda *args, **named: decoded.append(1) or decode(*args, **named)
    )
    dataset.batch(
        pack_id, 0, BatchOptions(rank_slice=RankSlice(tile_rank=0, tile_ranks=pack.tiles))
    )
    assert len(decoded) == 1 < len(pack.images)
