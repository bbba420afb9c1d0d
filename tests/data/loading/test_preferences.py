"""The two answers of a pair in a batch: their tokens are whose they are, and both see the images of
the pair, which are there once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megavlm.config.tiling import Mode
from megavlm.data.loading.batch import Batch, BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rank_slice import RankSlice
from megavlm.data.sample import Sample
from megavlm.io.open_files import OpenFiles
from megavlm.io.storage import ReadError
from megavlm.model.fusion import place_features, place_newlines
from tests.convert.llava_next_models import LARGE_SIZES, make_anyres_sample, write_anyres
from tests.data.preference_packs import (
    answers_apart,
    make_pairs,
    make_preferences,
    make_reference,
    with_rejected,
)
from tests.data.samples import write_packs

SIZES = dict(vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=16)
OPTIONS = BatchOptions(reduction="sample", with_preferences=True)


def _pairs(mode: Mode) -> list[Sample]:
    """Make pairs with one image, none, two, and (if the mode takes it) an image and a video."""
    rng = np.random.default_rng(3)
    if mode == "dynamic":
        return make_pairs(1, 4, **SIZES)[0]
    shown: list = [(LARGE_SIZES[5],), (), LARGE_SIZES[:2]]
    if mode == "anyres_max_9":
        shown.append(((40, 30, 2), LARGE_SIZES[2]))
    samples = [
        make_anyres_sample(rng, sizes, text_tokens=11 + line, line=line + 1, mode=mode, **SIZES)
        for line, sizes in enumerate(shown)
    ]
    return [with_rejected(one, rng, 5 + one.line, SIZES["vocab_size"]) for one in samples]


def _write(folder: Path, samples: list[Sample], mode: Mode) -> PackedDataset:
    settings = dict(capacity=1536, alignment=4, **SIZES)
    if mode == "dynamic":
        write_packs(folder, [samples], **settings)
    else:
        write_anyres(folder, [samples], mode, **settings)
    return PackedDataset(folder)


def _fused(batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Put features where they go among the tokens, and newlines of ones."""
    placed = place_features(torch.zeros(len(batch.tokens), 1, 8), features, batch)
    return place_newlines(placed, torch.ones(8), batch)


@pytest.mark.parametrize("mode", ["dynamic", "anyres", "anyres_max_9"])
def test_both_answers_see_the_images_that_are_stored_once(tmp_path: Path, mode: Mode) -> None:
    pairs = _pairs(mode)
    once = _write(tmp_path / "once", pairs, mode).batch(0, 0, OPTIONS)
    apart = _write(tmp_path / "apart", answers_apart(pairs), mode).batch(0, 0, OPTIONS)
    tiles = sum(pair.tiles for pair in pairs)
    assert len(once.tiles) == tiles and len(apart.tiles) == 2 * tiles
    for name in ("tokens", "labels", "loss_weights", "sample_ends", "is_padding"):
        assert torch.equal(vars_of(once)[name], vars_of(apart)[name]), name
    of_pairs = torch.randn(tiles, 16, 8).split([pair.tiles for pair in pairs])
    twice = torch.cat([features for each in of_pairs for features in (each, each)])
    found = _fused(once, torch.cat(of_pairs).view(-1, 1, 8))
    expected = _fused(apart, twice.view(-1, 1, 8))
    assert torch.equal(found, expected) and expected.count_nonzero() > 500
    if mode == "anyres_max_9":
        assert len(once.mixed.positions) == len(apart.mixed.positions) > 100


def vars_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(batch)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_of_their_answer(tmp_path: Path, ranks: int) -> None:
    make_preferences(tmp_path / "packs", packs=1, pairs=3, alignment=4)
    dataset = PackedDataset(tmp_path / "packs")
    whole = dataset.batch(0, 0, OPTIONS)
    seen = 0
    for rank in range(ranks):
        own = RankSlice(context_rank=rank, context_ranks=ranks)
        batch = dataset.batch(0, 0, dataclasses.replace(OPTIONS, rank_slice=own))
        places = own.tokens(whole.sample_ends.numpy())
        for place, answer in zip(places, batch.preferences.answers.tolist(), strict=True):
            if whole.is_padding[place]:
                assert answer == 6
            else:
                first, end = whole.sample_ends[answer : answer + 2].tolist()
                assert first <= place < end
                seen += 1
    assert seen == int((~whole.is_padding).sum()) and whole.samples == 6
    # Each answer weighs as much as any other, and the first of its tokens is no label.
    weights = [whole.loss_weights[whole.preferences.answers == one].sum() for one in range(6)]
    assert weights == pytest.approx([1.0] * 6)


def test_answers_without_their_placeholders_are_refused(tmp_path: Path) -> None:
    pairs = _pairs("dynamic")
    pairs[1].rejected.tokens[3] = 9  # one of an image's 16
    dataset = _write(tmp_path / "packs", pairs, "dynamic")
    with pytest.raises(ReadError, match="context tokens"):
        dataset.batch(0, 0, OPTIONS)


def test_files_of_a_reference_are_among_those_that_datasets_share(tmp_path: Path) -> None:
    """A process may not have two files open for each of a thousand datasets."""
    make_preferences(tmp_path / "packs", packs=2)
    make_reference(tmp_path / "reference", tmp_path / "packs")
    opened = OpenFiles()
    dataset = PackedDataset(tmp_path / "packs", reference=tmp_path / "reference", opened=opened)
    with mock.patch.object(opened, "read", wraps=opened.read) as read:
        dataset.batch(1, 0, OPTIONS)
    names = {call.args[0].name for call in read.call_args_list}
    assert {"starts.bin", "logprobs.bin"} < names
