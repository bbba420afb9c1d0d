"""A batch holds what its samples say, computed here token by token."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from megavlm.data.images.decode import decode_tiles
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset, label
from megavlm.data.loading.draws import drop_path_draws, pack_draw, patch_draws
from megavlm.data.sample import Image, Sample
from megavlm.data.store import reader
from megavlm.data.store.manifest import Manifest, Source
from megavlm.data.store.reader import Reader
from megavlm.io.storage import ReadError
from tests.data.samples import make_dataset, make_sample, store_packs, write_packs

CAPACITY = 256


@pytest.fixture(scope="module", params=[1, 16], ids=["close", "aligned"])
def dataset(request, tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=10, capacity=CAPACITY, alignment=request.param, shard_bytes=5000)
    return PackedDataset(folder)


def by_hand(dataset: PackedDataset, pack_id: int, reduction: str) -> dict[str, np.ndarray]:
    """Tokens, labels, weights and sample ends, one token after the other."""
    pack = dataset.reader.read(pack_id)
    alignment = dataset.manifest.alignment
    tokens = np.zeros(CAPACITY, np.int64)
    labels = np.zeros(CAPACITY, np.int64)
    weights = np.zeros(CAPACITY)
    ends = [0]
    stored = 0
    place = 0
    for length in pack.lengths.tolist():
        count = sum(bool(pack.supervised[stored + step]) for step in range(1, length))
        for step in range(length):
            tokens[place + step] = pack.tokens[stored + step]
            if step + 1 < length:
                labels[place + step] = pack.tokens[stored + step + 1]
                if pack.supervised[stored + step + 1]:
                    weights[place + step] = {
                        "token": 1,
                        "sample": 1 / count,
                        "square": count**-0.5,
                    }[reduction]
        stored += length
        place += length
        while place % alignment:
            place += 1
        ends.append(place)
    if place < CAPACITY:
        ends.append(CAPACITY)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_weights": weights,
        "sample_ends": np.array(ends),
    }


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_tokens_labels_and_weights(dataset, reduction):
    for pack_id in range(len(dataset)):
        batch = dataset.batch(pack_id, 0, BatchOptions(reduction=reduction))
        expected = by_hand(dataset, pack_id, reduction)
        assert np.array_equal(batch.tokens, expected["tokens"])
        assert np.array_equal(batch.labels, expected["labels"])
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert np.allclose(batch.loss_weights, expected["loss_weights"], rtol=1e-6, atol=0)
        assert np.array_equal(batch.sample_ends, expected["sample_ends"])
        lengths = np.diff(expected["sample_ends"]).tolist()
        assert batch.sample_lengths == tuple(lengths)
        assert batch.longest_sample == max(lengths)
        assert batch.weight_sum == pytest.approx(expected["loss_weights"].sum(), rel=1e-12)
        assert batch.weight_sum == dataset.weight_sum(np.array([pack_id]), reduction)
        assert np.all(batch.sample_ends.numpy()[:-1] % dataset.manifest.alignment == 0)


def test_tiles_and_feature_positions(dataset):
    kinds = set()
    for pack_id in range(len(dataset)):
        batch = dataset.batch(pack_id, 0, BatchOptions(vision_layers=3))
        pack = dataset.reader.read(pack_id)
        assert np.array_equal(batch.feature_positions, np.flatnonzero(batch.tokens == 500))
        assert len(batch.feature_positions) == pack.tiles * 16
        expected = [
            tile
            for place, row in enumerate(pack.images)
            for tile in decode_tiles(
                pack.image(place), int(row["columns"]), int(row["rows"]), 32, True
            )
        ]
        kinds.add(len(expected) > 0)
        expected = np.stack(expected) if expected else np.zeros((1, 3, 32, 32))
        assert batch.tiles.dtype == torch.uint8 and np.array_equal(batch.tiles, expected)
        assert batch.drop_path_draws.shape == (6, len(expected))
    assert kinds == {False, True}


@pytest.mark.parametrize("grid", [(2, 1), (2, 2)])
def test_tiles_without_a_thumbnail(tmp_path, grid):
    facts = dict(vocab_size=512, context_token_id=500, tile_size=32, features_per_tile=4)
    sample = make_sample(
        np.random.default_rng(0), images=1, text_tokens=5, line=1, grids=(grid,), **facts
    )
    [image] = sample.images
    count = grid[0] * grid[1]
    bare = dataclasses.replace(image, tiles=count)
    tokens = np.delete(sample.tokens, slice(1, 5))  # of the thumbnail
    supervised = sample.supervised[4:]
    changed = dataclasses.replace(sample, tokens=tokens, supervised=supervised, images=(bare,))
    write_packs(tmp_path / "bare", [[changed]], capacity=64, **facts)
    write_packs(tmp_path / "whole", [[sample]], capacity=64, **facts)
    found, whole = (PackedDataset(tmp_path / name).batch(0, 0).tiles for name in ("bare", "whole"))
    assert len(found) == count and torch.equal(found, whole[:count])


def test_tiles_are_filled_up_with_blank_ones(dataset):
    for pack_id in range(len(dataset)):
        plain = dataset.batch(pack_id, 3, BatchOptions(vision_layers=2))
        filled = dataset.batch(pack_id, 3, BatchOptions(vision_layers=2, tile_multiple=16))
        real = len(plain.tiles)
        assert len(filled.tiles) % 16 == 0 and real <= len(filled.tiles) < real + 16
        assert torch.equal(filled.tiles[:real], plain.tiles) and not filled.tiles[real:].any()
        assert torch.equal(filled.drop_path_draws[:, :real], plain.drop_path_draws)
        assert filled.drop_path_draws.shape == (4, len(filled.tiles))
        assert torch.equal(filled.feature_positions, plain.feature_positions)


def test_what_belongs_to_no_sample_is_the_padding_token_of_the_tokenizer(tmp_path):
    write_broken_image(tmp_path / "facts")
    manifest = dataclasses.replace(Reader(tmp_path / "facts").manifest, pad_token_id=9, alignment=4)
    facts = dict(supervised=np.ones(5, bool), images=(), source=0)
    samples = [
        Sample(tokens=np.arange(10, 15, dtype=np.int32), line=line, **facts) for line in (1, 2)
    ]
    store_packs(tmp_path / "padded", [samples], manifest)
    batch = PackedDataset(tmp_path / "padded").batch(0, 0)
    aligned = [*range(10, 15), 9, 9, 9]
    assert batch.tokens.tolist() == [*aligned, *aligned, *[9] * 48]
    assert torch.equal(batch.is_padding, batch.tokens == 9)


def test_patches_are_kept_by_seed_and_place(dataset):
    options = BatchOptions(patches=(49, 24), tile_multiple=4, seed=3)
    seen = []
    for pack_id in range(len(dataset)):
        kept = dataset.batch(pack_id, pack_id, options).kept_patches
        assert kept.shape[0] == 24 and kept.shape[1] % 4 == 0 and kept.dtype == torch.int64
        assert torch.equal(kept, kept.sort(dim=0).values) and int(kept.max()) < 49
        assert all(len(tile.unique()) == 24 for tile in kept.T)
        for position, seed in ((pack_id, 4), (99, 3)):
            other = dataset.batch(
                pack_id, position, dataclasses.replace(options, seed=seed)
            ).kept_patches
            assert not torch.equal(other, kept)
        real = max(1, dataset.reader.read(pack_id).tiles)
        seen += kept[:, :real].T.unique(dim=0)
        assert len(kept[:, :real].T.unique(dim=0)) == real
    counts = torch.stack(seen).flatten().bincount(minlength=49)
    expected = len(seen) * 24 / 49
    assert (counts > 0.3 * expected).all() and (counts < 2 * expected).all()
    assert dataset.batch(0, 7).kept_patches is None


def test_a_batch_has_the_draws_of_its_seed_and_position(dataset):
    for pack_id in range(len(dataset)):
        batch = dataset.batch(pack_id, 7, BatchOptions(seed=5, vision_layers=2, patches=(9, 4)))
        tiles = max(1, dataset.reader.read(pack_id).tiles)
        draws = np.concatenate([batch.drop_path_draws, batch.pair_draws])
        assert np.array_equal(draws, drop_path_draws(5, 7, 6, tiles))
        order = np.argsort(patch_draws(5, 7, 9, tiles), axis=0)
        assert np.array_equal(batch.kept_patches, np.sort(order[:4], axis=0))
        assert batch.draw == pack_draw(5, 7)


def test_without_tiles_all_else_is_equal(dataset):
    for pack_id in range(len(dataset)):
        with_tiles, without = (
            dataset.batch(pack_id, 5, BatchOptions(vision_layers=2, seed=1, with_tiles=wanted))
            for wanted in (True, False)
        )
        assert without.tiles.shape == (0, 3, 32, 32)
        assert without.num_tiles == with_tiles.num_tiles == len(with_tiles.tiles) > 0
        assert dataclasses.replace(with_tiles, tiles=without.tiles) == without != with_tiles


def test_the_first_token_of_a_sample_is_nobodys_label():
    tokens = np.array([1, 2, 3, 4, 5], np.int32)
    found = label(tokens, np.ones(5, bool), np.array([2, 3]), "sample")
    assert [values.tolist() for values in found] == [[2, 0, 4, 5, 0], [1, 0, 0.5, 0.5, 0]]


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_a_sample_without_a_supervised_token_weighs_nothing(reduction):
    tokens = np.array([1, 2, 3, 4, 5], np.int32)
    supervised = np.array([False, True, True, False, False])
    _, weights = label(tokens, supervised, np.array([2, 3]), reduction)
    assert weights.tolist() == [1, 0, 0, 0, 0]


def test_weight_sum_does_not_depend_on_order(dataset):
    ids = np.tile(np.arange(len(dataset)), 50)
    sums = {
        dataset.weight_sum(np.random.default_rng(seed).permutation(ids), "square")
        for seed in range(10)
    }
    assert len(sums) == 1
    with pytest.raises(
        ValueError, match="--data.loss_reduction mean: must be one of token, sample, square"
    ):
        dataset.weight_sum(ids, "mean")
    with pytest.raises(ValueError, match="--data.loss_reduction mean"):
        dataset.batch(0, 0, BatchOptions(reduction="mean"))


def test_draws_depend_on_seed_and_position_alone():
    draws = drop_path_draws(3, 17, 48, 13)
    assert draws.shape == (48, 13) and draws.dtype == np.float32
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.05
    assert np.array_equal(draws, drop_path_draws(3, 17, 48, 13))
    others = [
        drop_path_draws(3, 18, 48, 13),
        drop_path_draws(4, 17, 48, 13),
        drop_path_draws(-1, 17, 48, 13),
    ]
    assert all(not np.intersect1d(draws[:4], other).size > 2 for other in others)
    assert drop_path_draws(3, 10**15, 0, 4).shape == (0, 4)


def test_pickle(dataset, monkeypatch):
    def fail(folders):
        raise AssertionError("a worker has no need to look at all shards again")

    monkeypatch.setattr(reader, "check_shards", fail)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.batch(3, 0).tokens, dataset.batch(3, 0).tokens)
    assert copy.has_images and copy.folder == dataset.folder


def test_some_records_are_spread_over_all_packs(dataset):
    assert np.array_equal(dataset.some_records(4), dataset.index[[0, 3, 6, 9]])
    assert np.array_equal(dataset.some_records(), dataset.index[np.arange(10)])


def test_images_that_are_not_decoded_are_not_read(tmp_path):
    make_dataset(tmp_path, packs=1, image_share=1.0)
    path = tmp_path / "packs-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # in the last image
    dataset = PackedDataset(tmp_path)
    with pytest.raises(ReadError, match="CRC32 of its images"):
        dataset.batch(0, 0)
    assert dataset.batch(0, 0, BatchOptions(with_tiles=False)).num_features > 0


@pytest.mark.parametrize("source", [1, -1])
def test_a_source_that_the_manifest_does_not_list_is_told(tmp_path, source):
    facts = dict(supervised=np.ones(5, bool), images=(), line=1)
    samples = [
        Sample(tokens=np.arange(5, dtype=np.int32), source=which, **facts) for which in (0, source)
    ]
    facts = dict(vocab_size=512, context_token_id=500, tile_size=32, features_per_tile=4)
    write_packs(tmp_path, [samples], capacity=64, **facts)
    with pytest.raises(ReadError, match=f"of source {source}, but manifest.json lists 1 sources"):
        PackedDataset(tmp_path).batch(0, 0)
    assert PackedDataset(tmp_path).origins(0) == ["random.jsonl:1", f"source {source}:1"]


@pytest.mark.parametrize("images", [(0, 1), (1, 0), (2, 0), (1, 1)])
def test_packs_for_pairs_have_one_tile_a_sample(tmp_path, images):
    """As many tiles as samples are not enough: each text would meet the image of another."""
    facts = dict(vocab_size=512, context_token_id=-1, tile_size=32, features_per_tile=0)
    rng = np.random.default_rng(0)
    pairs = [
        make_sample(rng, images=count, text_tokens=5, line=1, grids=((1, 1),), **facts)
        for count in images
    ]
    write_packs(tmp_path, [pairs], capacity=64, **facts)
    dataset = PackedDataset(tmp_path)
    if images == (1, 1):
        assert len(dataset.batch(0, 0).tiles) == 2
        seen, blind = (
            dataset.batch(0, 0, BatchOptions(with_pair_ids=True, with_tiles=wanted))
            for wanted in (True, False)
        )
        assert torch.equal(blind.pair_ids, seen.pair_ids) and len(seen.pair_ids[:, 0].unique()) == 2
        return
    with pytest.raises(ReadError, match=rf"2 samples have {sum(images)} tiles, not one each"):
        dataset.batch(0, 0)


def test_pairs_with_one_image_or_one_text_are_told(tmp_path):
    facts = dict(vocab_size=512, context_token_id=-1, tile_size=32, features_per_tile=0)
    rng = np.random.default_rng(0)
    one, other = (
        make_sample(rng, images=1, text_tokens=5, line=line, grids=((1, 1),), **facts)
        for line in (1, 2)
    )
    pairs = [one, dataclasses.replace(other, images=one.images)]
    pairs.append(dataclasses.replace(other, tokens=one.tokens))
    write_packs(tmp_path, [pairs], capacity=64, **facts)
    ids = PackedDataset(tmp_path).batch(0, 0, BatchOptions(with_pair_ids=True)).pair_ids
    (first, second, third), (text, different, same) = ids.T.tolist()
    assert first == second != third and text == same != different
    assert ids.abs().min() > 2**32, "so long that no two of a run are equal by chance"


@pytest.mark.parametrize("features", [9, 25])
def test_context_tokens_that_do_not_match(tmp_path, features):
    make_dataset(tmp_path, packs=3, image_share=1.0)
    path = tmp_path / "manifest.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"features_per_tile": features}))
    dataset = PackedDataset(tmp_path)
    tiles = int(dataset.index[1]["tiles"])
    with pytest.raises(
        ValueError,
        match=(
            rf"pack 1 has {tiles * 16} context tokens .* {tiles} tiles of {features} features need"
            rf" {tiles * features}"
        ),
    ) as caught:
        dataset.batch(1, 0)
    assert str(tmp_path) in str(caught.value)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_broken_image(tmp_path)
    with pytest.raises(
        ValueError,
        match=(
            r"pack 0: image 0 of the pack, from the sample at captions.jsonl:41, cannot be decoded"
        ),
    ) as caught:
        PackedDataset(tmp_path).batch(0, 0)
    assert str(tmp_path) in str(caught.value)
    assert PackedDataset(tmp_path).origins(0) == ["captions.jsonl:40", "captions.jsonl:41"]
    assert PackedDataset(tmp_path).batch(0, 0, BatchOptions(with_tiles=False)).tiles.shape[0] == 0


def write_broken_image(folder) -> None:
    """One pack of a text sample (line 40) and a sample whose image is no image (line 41)."""
    text = Sample(
        tokens=np.arange(5, dtype=np.int32),
        supervised=np.ones(5, bool),
        images=(),
        source=0,
        line=40,
    )
    image = Image(encoded=b"not an image", width=32, height=32, columns=1, rows=1, tiles=1)
    tokens = np.array([1, 500, 500, 500, 500, 2], np.int32)
    broken = Sample(tokens=tokens, supervised=np.ones(6, bool), images=(image,), source=0, line=41)
    manifest = Manifest(
        tokenizer_fingerprint="x",
        vocab_size=512,
        context_token_id=500,
        template="t",
        image_size=32,
        features_per_tile=4,
        capacity=64,
        tile_cap=9,
        sources=(Source(name="captions", annotations="captions.jsonl"),),
    )
    store_packs(folder, [[text, broken]], manifest)


def test_a_full_pack_has_no_padding_sample(tmp_path):
    sample = Sample(
        tokens=np.arange(64, dtype=np.int32),
        supervised=np.ones(64, bool),
        images=(),
        source=0,
        line=1,
    )
    write_broken_image(tmp_path / "facts")
    manifest = Reader(tmp_path / "facts").manifest
    store_packs(tmp_path / "full", [[sample]], manifest)
    batch = PackedDataset(tmp_path / "full").batch(0, 0, BatchOptions(reduction="token"))
    assert (
        batch.sample_ends.tolist() == [0, 64]
        and batch.weight_sum == 63
        and batch.tiles.shape == (1, 3, 32, 32)
    )
    assert not PackedDataset(tmp_path / "full").has_images and not batch.tiles.any()
