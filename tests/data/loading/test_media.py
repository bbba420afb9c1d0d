"""Which tokens read which image: against the mask of IDEFICS's processor, and a dense mask against
segments.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.idefics import processing_idefics

from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset, sample_positions
from megavlm.data.loading.draws import next_image_draws
from megavlm.data.loading.media import find_media, group_by_image, images_read
from megavlm.data.loading.rank_slice import RankSlice
from megavlm.data.sample import Sample
from megavlm.model.attention import PackedAttention, PackedSamples
from tests.data.samples import make_image, write_packs

IMAGE = 7
END = 2
PACKS = 1000 if os.environ.get("MEGAVLM_MATRIX") == "all" else 40


def random_pack(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and lengths of samples, some without images."""
    lengths = rng.integers(1, 12, int(rng.integers(1, 6)))
    tokens = rng.integers(3, 7, lengths.sum())
    share = rng.random(2) * 0.4
    tokens[rng.random(len(tokens)) < share[0]] = IMAGE
    tokens[rng.random(len(tokens)) < share[1]] = END
    return tokens, lengths


def test_each_token_reads_the_image_that_the_processor_of_idefics_says() -> None:
    class Words:
        eos_token_id = END

        def convert_tokens_to_ids(self, token: str) -> int:
            return IMAGE

    rng = np.random.default_rng(0)
    for _ in range(PACKS):
        tokens, lengths = random_pack(rng)
        reads_next = rng.random(len(lengths)) < 0.5
        found = images_read(tokens, lengths, IMAGE, END, reads_next)
        start = 0
        shown = 0
        for length, is_next in zip(lengths, reads_next, strict=True):
            ids = torch.from_numpy(tokens[start : start + length].copy())[None]
            masks = processing_idefics.image_attention_mask_for_packed_input_ids_pt(ids, Words())
            usual, following = (mask[0].numpy() for mask in masks)
            wanted = np.where(following >= 0, following, usual) if is_next else usual
            wanted = np.where(wanted >= 0, wanted + shown, -1)
            np.testing.assert_array_equal(found[start : start + length], wanted)
            start += length
            shown += int((ids == IMAGE).sum())


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([1, IMAGE, 3, 4, END], [0, 0, 0, 0, 0]),  # a caption
        ([1, 3, IMAGE, 4, 5, END], [0, 0, 0, 0, 0, 0]),  # a chat
        ([1, IMAGE, 3, END, IMAGE, 4, END], [0, 0, 0, 0, 1, 1, 1]),  # examples
        ([1, IMAGE, 3, IMAGE, 4, END], [0, 0, 1, 1, 1, 1]),  # a document
    ],
)
def test_no_text_loses_its_only_image_to_the_next(tokens: list[int], wanted: list[int]) -> None:
    length = np.array([len(tokens)])
    found = images_read(np.array(tokens), length, IMAGE, END, np.ones(1, bool))
    assert found.tolist() == wanted


def test_which_samples_read_the_next_image_depends_on_seed_and_position_alone() -> None:
    draws = next_image_draws(3, 5, 2000)
    assert np.array_equal(draws, next_image_draws(3, 5, 2000))
    assert not np.array_equal(draws, next_image_draws(3, 6, 2000))
    assert 0.45 < (draws < 0.5).mean() < 0.55 and np.array_equal(
        draws[:7], next_image_draws(3, 5, 7)
    )


def test_a_text_may_end_with_the_first_token_of_the_vocabulary() -> None:
    found = images_read(np.array([1, IMAGE, 3, 0, 4]), np.array([5]), IMAGE, 0)
    assert found.tolist() == [-1, 0, 0, 0, -1]


def test_the_samples_below_the_share_read_the_next_image(tmp_path: Path) -> None:
    facts = dict(supervised=np.ones(4, bool), source=0, line=1)
    image = make_image(np.random.default_rng(0), 16, 1, 1)
    tokens = np.array([1, 3, IMAGE, 4], np.int32)
    samples = [Sample(tokens=tokens, images=(image,), **facts) for _ in range(12)]
    sizes = dict(vocab_size=9, context_token_id=IMAGE, tile_size=16, features_per_tile=1)
    write_packs(tmp_path, [samples], capacity=48, **sizes)
    dataset = PackedDataset(tmp_path, next_image=0.3)
    media = dataset.batch(0, 5, BatchOptions(seed=3, with_tiles=False)).media
    reads_next = next_image_draws(3, 5, 12) < 0.3
    assert 0 < reads_next.sum() < 6
    # With the next image, the tokens in front of it read it, too.
    assert media.ends.diff().tolist() == [4 if is_next else 2 for is_next in reads_next]
    # A patch has one placeholder token, too, and is no image.
    for other in (dict(tiling="patches"), dict(features_per_tile=2)):
        manifest = replace(dataset.manifest, **other)
        assert find_media(dataset.reader.read(0), manifest, np.arange(48)) is None


def test_segments_attend_as_a_dense_mask_says_on_any_number_of_ranks() -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    features = 3
    attention = PackedAttention()
    for number in range(PACKS):
        tokens, lengths = random_pack(rng)
        ranks = 1 + number % 2
        capacity = int((-(-lengths // 4) * 4).sum()) + 8
        positions, ends = sample_positions(lengths, 4, capacity)
        reads_next = rng.random(len(lengths)) < 0.5
        read = images_read(tokens, lengths, IMAGE, END, reads_next)
        images = max(int((tokens == IMAGE).sum()), 1)
        query = torch.randn(capacity, 2, 4)
        key, value = torch.randn(2, images * features, 2, 4)
        seen = torch.full((capacity,), -1)
        seen[torch.from_numpy(positions)] = torch.from_numpy(read)
        mask = seen[:, None] == torch.arange(images).repeat_interleave(features)
        expected = scaled_dot_product_attention(
            *(one.transpose(0, 1) for one in (query, key, value)), attn_mask=mask
        ).transpose(0, 1)
        expected[seen < 0] = 0
        for rank in range(ranks):
            own = RankSlice(context_rank=rank, context_ranks=ranks).tokens(ends)
            local = np.full(capacity, -1)
            local[own] = np.arange(len(own))
            media = group_by_image(read, local[positions])
            mine = query[own]
            found = torch.zeros(len(own), 8)
            if media.is_real:
                blocks = [
                    one.view(images, features, 2, 4)[media.images].flatten(0, 1)
                    for one in (key, value)
                ]
                samples = PackedSamples(
                    qkv_format="thd",
                    query_lengths=media.lengths,
                    key_lengths=tuple((media.image_ends * features).diff().tolist()),
                )
                attention.is_causal = False
                found[media.rows] = attention(mine[media.rows], *blocks, packed_seq_params=samples)
                assert media.lengths == tuple(media.ends.diff().tolist())
            else:
                assert (seen[own] < 0).all() and media.ends.tolist() == [0, 1]
                assert media.rows.tolist() == media.images.tolist() == [0]
            torch.testing.assert_close(found.view(-1, 2, 4), expected[own], atol=1e-6, rtol=1e-5)
