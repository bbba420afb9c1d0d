"""Images of any size in batches against the functions of ``transformers``: where patches stand,
where windows end, which feature stands where, and the positions of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from megavlm.config.recipes.qwen2_5_vl import ARCHITECTURE
from megavlm.data.images.decode import decode_tiles
from megavlm.data.images.feature_layout import Tiled, as_tiled, images_in_text
from megavlm.data.images.native import native_grid
from megavlm.data.loading.batch import Batch, BatchOptions, options_of
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.native_images import EVEN_TILES, deal
from megavlm.data.loading.rank_slice import RankSlice
from megavlm.io.storage import ReadError
from tests.data.native_packs import CONTEXT, TILE, Clip, write_native
from tests.data.samples import make_dataset

# Width and height of the images of each sample, in pixels of tiles of 28: whole windows, partial
# ones in both ways, one tile, long strips; videos of even and odd numbers of frames, and one whose
# pairs are images of their own.
SAMPLES = [
    [(224, 224)],
    [Clip(size=(140, 90), frames=4, interval=1.4), (56, 56)],
    [],
    [(140, 364), (28, 28), Clip(size=(120, 56), frames=5, interval=0.5)],
    [Clip(size=(84, 60), frames=5, apart=True)],
    [(500, 90), (56, 620), (333, 333)],
    [],
    [(112, 112), (112, 140)],
]
OPTIONS = BatchOptions(
    spans_tiles=True, window_tiles=4, tile_grid=2, rotary_axes=True, tokens_per_second=2
)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "preferences"])
def dataset(request, tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("packs")
    write_native(folder, SAMPLES, alignment=8, preferences=request.param)
    return PackedDataset(folder)


def grids_of(dataset: PackedDataset, pack_id: int) -> torch.Tensor:
    """Return what transformers calls ``image_grid_thw``, in patches, with frames of videos."""
    shown = as_tiled(dataset.reader.read(pack_id).images)
    return torch.cat([grid_of(group) for group in images_in_text(shown)])


def grid_of(group: Sequence[Tiled]) -> torch.Tensor:
    """Return the grid of an image or a video, int64 [1, 3]."""
    pairs = sum(image.tiles > 0 for image in group)
    return torch.tensor([[pairs, 2 * group[0].rows, 2 * group[0].columns]])


def test_patches_and_windows_are_those_of_transformers(dataset: PackedDataset) -> None:
    grids = grids_of(dataset, 0)
    assert len(grids) == 14
    batch = dataset.batch(0, 0, OPTIONS)
    order, window_ends = get_vision_window_index(grids, 2, 112, 14)
    places = get_vision_position_ids(grids, 2)
    expected = places.reshape(-1, 4, 2)[order].reshape(-1, 2)
    assert torch.equal(batch.images.places, expected.T)
    assert torch.equal(batch.images.ends, get_vision_cu_seqlens(grids))
    assert torch.equal(batch.images.window_ends, window_ends)
    assert batch.images.lengths == tuple(batch.images.ends.diff().tolist())
    assert batch.images.window_lengths == tuple(window_ends.diff().tolist())
    assert min(batch.images.window_lengths) == 4 and max(batch.images.window_lengths) == 64
    # A feature stands where transformers puts it when it has undone the order of windows.
    times = 2 if dataset.manifest.preferences else 1
    back = torch.argsort(order)
    assert batch.feature_numbers.bincount().tolist() == [times] * len(back)
    if times == 1:
        assert torch.equal(batch.feature_numbers, back)


def test_tiles_stand_in_the_order_of_windows(dataset: PackedDataset) -> None:
    pack = dataset.reader.read(0)
    batch = dataset.batch(0, 0, OPTIONS)
    frames: tuple[list, list] = ([], [])
    for index, row in enumerate(pack.images):
        grid = int(row["columns"]), int(row["rows"])
        own = decode_tiles(pack.image(index), *grid, TILE, False)
        frames[not row["tiles"]].append(own)
        if row["tiles"]:
            frames[1].append(own)  # if no second frame follows
        else:
            del frames[1][-2]
    order, _ = get_vision_window_index(grids_of(dataset, 0), 2, 112, 14)
    firsts, seconds = (np.concatenate(tiles)[order.numpy()] for tiles in frames)
    assert np.array_equal(batch.tiles.numpy(), firsts)
    assert np.array_equal(second_frames(batch).numpy(), seconds)
    pairs = (firsts != seconds).any((1, 2, 3))
    assert np.array_equal(np.flatnonzero(pairs), batch.images.pairs.numpy()) and pairs.sum() > 0
    assert len(np.unique(firsts, axis=0)) == len(firsts)


def test_without_windows_tiles_stand_row_by_row(dataset: PackedDataset) -> None:
    grids = grids_of(dataset, 0)
    batch = dataset.batch(0, 0, BatchOptions(spans_tiles=True, tile_grid=2))
    assert torch.equal(batch.images.places, get_vision_position_ids(grids, 2).T)
    assert batch.images.window_ends is None and batch.images.window_lengths == ()
    assert batch.rotary_positions is None


def positions_of_transformers(dataset: PackedDataset, pack_id: int) -> list[torch.Tensor]:
    """Return frame, row and column of the tokens of each sample of a pack [3, tokens]."""
    pack = dataset.reader.read(pack_id)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    )
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *given, **named: Qwen2_5_VLModel.get_vision_position_ids(
        model, *given, **named
    )
    found = []
    start = 0
    for sample, length in enumerate(pack.lengths.tolist()):
        tokens = torch.from_numpy(pack.tokens[start : start + length].astype(np.int64))[None]
        owner = sample - sample % 2 if dataset.manifest.preferences else sample
        kinds = (tokens == CONTEXT).int()
        places = kinds[0].nonzero()[:, 0]
        grids: tuple[list, list] = ([], [])
        intervals = []
        for group in images_in_text(as_tiled(pack.images[pack.images["sample"] == owner])):
            grid = grid_of(group)
            is_video = group[0].frames > 0
            kinds[0, places[: grid.prod() // 4]] = 1 + is_video
            places = places[grid.prod() // 4 :]
            grids[is_video].append(grid)
            intervals += [group[0].interval] * is_video
        assert not len(places)
        of_images, of_videos = (torch.cat(own) if own else None for own in grids)
        positions, _ = Qwen2_5_VLModel.get_rope_index(
            model, tokens, kinds, of_images, of_videos, intervals
        )
        found.append(positions[:, 0])
        start += length
    return found


def test_positions_of_tokens_are_those_of_transformers(dataset: PackedDataset) -> None:
    expected = positions_of_transformers(dataset, 0)
    batch = dataset.batch(0, 0, OPTIONS)
    assert batch.rotary_positions.shape == (3, len(batch.tokens))
    assert batch.rotary_positions.dtype == torch.int64
    starts = batch.sample_ends.tolist()
    for start, positions in zip(starts, expected, strict=False):
        end = start + positions.shape[1]
        assert torch.equal(batch.rotary_positions[:, start:end], positions)
    assert batch.rotary_positions[:, batch.is_padding].eq(0).all()


def second_frames(batch: Batch) -> torch.Tensor:
    """Return the second frame that each tile shows; of an image the same as the first."""
    found = batch.tiles.clone()
    if batch.images.pairs is not None:
        found[batch.images.pairs] = batch.images.second_frames
    return found


@pytest.mark.parametrize(
    ("rate", "frames", "following"), [(0, [0, 1, 2, 3], 4), (2, [0, 6, 13, 19], 20)]
)
def test_a_text_goes_on_behind_the_last_frame_of_a_long_video(
    tmp_path: Path, rate: int, frames: list[int], following: int
) -> None:
    """As in the authors' code and transformers 4; in transformers 5 behind rows and columns."""
    write_native(tmp_path, [[Clip(size=(56, 28), frames=8, interval=3.3)]])
    batch = PackedDataset(tmp_path).batch(0, 0, replace(OPTIONS, tokens_per_second=rate))
    shown = batch.rotary_positions[:, 2:10] - 2
    assert shown.tolist() == [np.repeat(frames, 2).tolist(), [0] * 8, [0, 1] * 4]
    text = batch.rotary_positions[:, 10:-4]
    assert torch.equal(text, (following + 2 + torch.arange(text.shape[1])).expand(3, -1))


@pytest.mark.parametrize("ranks", [2, 3, 16])
@pytest.mark.parametrize("multiple", [1, 8])
def test_ranks_have_whole_images_and_find_the_features_of_all(
    dataset: PackedDataset, ranks: int, multiple: int
) -> None:
    whole = dataset.batch(0, 0, OPTIONS)
    shares = [
        dataset.batch(
            0,
            0,
            BatchOptions(
                spans_tiles=True,
                window_tiles=4,
                tile_grid=2,
                rotary_axes=True,
                tokens_per_second=2,
                tile_multiple=multiple,
                vision_layers=1,
                rank_slice=RankSlice(tile_rank=rank, tile_ranks=ranks),
            ),
        )
        for rank in range(ranks)
    ]
    counts = {share.num_tiles for share in shares}
    assert len(counts) == 1 and not counts.pop() % multiple
    tiles = torch.cat([share.tiles for share in shares])
    seconds = torch.cat(list(map(second_frames, shares)))
    both = second_frames(whole)
    assert not torch.equal(both, whole.tiles)
    for share in shares:
        assert share.num_tiles == len(share.tiles) == share.images.places.shape[1] // 4
        assert share.images.ends[-1] == share.images.window_ends[-1] == 4 * len(share.tiles)
        assert torch.equal(share.feature_positions, whole.feature_positions)
        assert torch.equal(share.rotary_positions, whole.rotary_positions)
        # The feature of a tile on any rank is that of the same tile on one rank.
        assert torch.equal(tiles[share.feature_numbers], whole.tiles[whole.feature_numbers])
        assert torch.equal(seconds[share.feature_numbers], both[whole.feature_numbers])
    seen = set(shares[0].feature_numbers.tolist())
    padding = [tile for tile in range(len(tiles)) if tile not in seen]
    assert not tiles[padding].any()
    lengths = sorted(length for share in shares for length in share.images.lengths)
    assert lengths == sorted((*whole.images.lengths, *[4] * len(padding)))


def cost_of(dealt: Sequence[Sequence[int]]) -> int:
    """Return what the tiles of images cost that are dealt out to ranks, padding and attention
    counted.
    """
    work = max(sum(tiles) for tiles in dealt)
    return EVEN_TILES * work + max(sum(count**2 for count in tiles) for tiles in dealt)


@pytest.mark.parametrize("seed", range(20))
def test_costs_are_spread_over_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = (rng.integers(2, 36, 7) ** 2).tolist()
    dealt = deal(tiles, 3)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(7))
    assert all(numbers == sorted(numbers) for numbers in dealt)
    found = cost_of([[tiles[number] for number in numbers] for numbers in dealt])
    least = min(
        cost_of(
            [[n for n, own in zip(tiles, owners, strict=True) if own == rank] for rank in range(3)]
        )
        for owners in itertools.product(range(3), repeat=7)
    )
    # What the largest first at the least loaded is known for (R. Graham, 1969).
    assert found <= 4 / 3 * least


def test_of_equal_numbers_of_tiles_the_rank_with_less_attention_gets_an_image() -> None:
    # Without it the last one would go to the first rank, whose patches see most others.
    assert deal([400, *[25] * 16, 25], 2) == [[0], list(range(1, 18))]


def test_frames_of_a_video_are_changed_alike(tmp_path: Path) -> None:
    manifest = write_native(tmp_path, [[(28, 28), Clip(size=(28, 28), frames=5)]])
    source = replace(manifest.sources[0], augment=True)
    replace(manifest, sources=(source,)).write(tmp_path)
    plain = PackedDataset(tmp_path).batch(0, 0, OPTIONS)
    found = set()
    for position in range(12):
        batch = PackedDataset(tmp_path, augment=("flip",)).batch(0, position, OPTIONS)
        flips = [
            not torch.equal(changed, before)
            for changed, before in (
                *zip(batch.tiles, plain.tiles, strict=True),
                *zip(batch.images.second_frames, plain.images.second_frames, strict=True),
            )
        ]
        assert len(flips) == 6 and len(set(flips[1:])) == 1
        found.add((flips[0], flips[1]))
    assert len(found) == 4  # an image beside it is not changed as the video is


def test_a_pack_of_texts_has_one_padding_tile(tmp_path: Path) -> None:
    write_native(tmp_path, [[], []])
    dataset = PackedDataset(tmp_path)
    for batch in (dataset.batch(0, 0, OPTIONS), dataset.blank(0, 0, OPTIONS)):
        assert batch.tiles.shape == (1, 3, TILE, TILE) and not batch.tiles.any()
        assert batch.images.lengths == batch.images.window_lengths == (4,)
        assert batch.images.places.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
        assert batch.num_features == len(batch.feature_numbers) == 0
    batch = dataset.batch(0, 0, OPTIONS)
    for start, end in zip(batch.sample_ends[:-2], batch.sample_ends[1:-1], strict=True):
        length = int((~batch.is_padding[start:end]).sum())
        expected = torch.arange(length).expand(3, -1)
        assert torch.equal(batch.rotary_positions[:, start : start + length], expected)


def test_texts_that_were_packed_for_other_tiles_have_a_padding_tile_of_the_model(
    tmp_path: Path,
) -> None:
    make_dataset(tmp_path, packs=1, image_share=0, tile_size=4 * TILE)
    dataset = PackedDataset(tmp_path)
    options = options_of(ARCHITECTURE)
    for batch in (dataset.batch(0, 0, options), dataset.blank(0, 0, options)):
        assert batch.tiles.shape == (1, 3, TILE, TILE) and not batch.tiles.any()
        assert batch.images.places.shape == (2, 4)


def test_context_parallel_ranks_have_the_positions_of_their_tokens(
    dataset: PackedDataset,
) -> None:
    whole = dataset.batch(0, 0, OPTIONS)
    for rank in range(2):
        own = RankSlice(context_rank=rank, context_ranks=2, tile_rank=rank, tile_ranks=2)
        options = replace(OPTIONS, rank_slice=own)
        batch = dataset.batch(0, 0, options)
        tokens = own.tokens(whole.sample_ends.numpy())
        assert torch.equal(batch.rotary_positions, whole.rotary_positions[:, tokens])
        assert torch.equal(batch.tokens, whole.tokens[tokens])


def test_pixels_that_are_not_asked_for_are_not_decoded(dataset: PackedDataset) -> None:
    with_tiles = dataset.batch(0, 0, OPTIONS)
    options = BatchOptions(spans_tiles=True, window_tiles=4, tile_grid=2, with_tiles=False)
    batch = dataset.batch(0, 0, options)
    assert len(batch.tiles) == 0 and batch.num_tiles == with_tiles.num_tiles
    assert batch.images == replace(with_tiles.images, second_frames=None)
    assert batch.images.pairs is not None


def test_tiles_with_thumbnails_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, packs=4, capacity=256)
    dataset = PackedDataset(tmp_path)
    for options in (BatchOptions(spans_tiles=True), BatchOptions(rotary_axes=True)):
        with pytest.raises(ReadError, match="pack with --tiling native"):
            for pack_id in range(len(dataset)):
                dataset.batch(pack_id, 0, options)


def test_grids_of_the_packs_are_those_of_the_rule(dataset: PackedDataset) -> None:
    for row in dataset.reader.read(0).images:
        size = int(row["width"]), int(row["height"])
        assert (int(row["columns"]), int(row["rows"])) == native_grid(*size, TILE, 784, 10**6)
