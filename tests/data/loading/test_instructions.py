"""Which instruction a Q-Former reads beside each tile: that of the tile's sample, on any rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rank_slice import RankSlice
from tests.data.samples import make_sample, write_packs

SIZES = dict(vocab_size=512, context_token_id=500, tile_size=32, features_per_tile=4)
IMAGES = (2, 0, 1)
LENGTHS = (3, 0, 5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    rng = np.random.default_rng(2)
    samples = [
        make_sample(
            rng, images=images, text_tokens=6, line=line, instruction_tokens=length, **SIZES
        )
        for line, (images, length) in enumerate(zip(IMAGES, LENGTHS, strict=True), start=1)
    ]
    folder = tmp_path_factory.mktemp("packs")
    write_packs(folder, [samples], capacity=200, instruction_length=7, **SIZES)
    return PackedDataset(folder)


def test_every_tile_has_the_instruction_of_its_sample(dataset: PackedDataset) -> None:
    pack = dataset.reader.read(0)
    found = dataset.batch(0, 0).instructions
    own = np.repeat(pack.images["sample"], pack.images["tiles"])
    assert found.lengths.tolist() == [LENGTHS[sample] for sample in own]
    wanted = {0: pack.instructions[:3], 2: pack.instructions[3:]}
    for row, sample in zip(found.tokens, own, strict=True):
        length = LENGTHS[sample]
        assert row[:length].tolist() == wanted[sample].tolist() and not row[length:].any()
    assert found.tokens.shape == (pack.tiles, 7)


def test_ranks_have_the_instructions_of_their_own_tiles(dataset: PackedDataset) -> None:
    whole = dataset.batch(0, 0).instructions
    parts = [
        dataset.batch(
            0, 0, BatchOptions(rank_slice=RankSlice(tile_rank=rank, tile_ranks=3))
        ).instructions
        for rank in range(3)
    ]
    lengths = np.concatenate([part.lengths for part in parts])
    tokens = np.concatenate([part.tokens for part in parts])
    tiles = len(whole.lengths)
    assert lengths[:tiles].tolist() == whole.lengths.tolist() and not lengths[tiles:].any()
    assert np.array_equal(tokens[:tiles], whole.tokens) and not tokens[tiles:].any()


def test_packs_without_instructions_have_none(tmp_path: Path) -> None:
    sample = make_sample(np.random.default_rng(0), images=1, text_tokens=6, line=1, **SIZES)
    write_packs(tmp_path, [[sample]], capacity=200, **SIZES)
    assert PackedDataset(tmp_path).batch(0, 0).instructions is None
