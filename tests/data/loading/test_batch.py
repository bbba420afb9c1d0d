"""A batch keeps its facts when it is moved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megavlm.data.loading.batch import Batch, Prefixes


def make_batch() -> Batch:
    return Batch.of(
        tokens=np.arange(4),
        labels=np.array([1, 2, 3, 0]),
        loss_weights=np.ones(4, np.float32),
        loss_positions=np.arange(4),
        sources=np.zeros(4, np.int32),
        sample_ends=np.array([0, 4], np.int32),
        sample_lengths=(4,),
        longest_sample=4,
        is_padding=np.zeros(4, bool),
        prefixes=Prefixes(
            inside=torch.arange(3),
            outside=torch.tensor([3]),
            ends=torch.tensor([0, 3], dtype=torch.int32),
            lengths=(3,),
        ),
        tiles=np.zeros((1, 3, 2, 2), np.uint8),
        feature_positions=np.zeros(0, np.int64),
        feature_numbers=np.zeros(0, np.int64),
        newline_positions=np.zeros(0, np.int64),
        num_features=0,
        drop_path_draws=np.zeros((2, 1), np.float32),
        weight_sum=4.0,
        pack_id=7,
    )


def test_of_shares_memory_and_keeps_types():
    tokens = np.arange(4)
    batch = dataclasses.replace(make_batch(), tokens=torch.from_numpy(tokens))
    tokens[0] = 9
    assert batch.tokens[0] == 9
    kinds = {entry.name: getattr(batch, entry.name) for entry in dataclasses.fields(batch)}
    assert {
        name: value.dtype for name, value in kinds.items() if isinstance(value, torch.Tensor)
    } == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_weights": torch.float32,
        "is_padding": torch.bool,
        "loss_positions": torch.int64,
        "sources": torch.int32,
        "sample_ends": torch.int32,
        "tiles": torch.uint8,
        "feature_positions": torch.int64,
        "feature_numbers": torch.int64,
        "newline_positions": torch.int64,
        "drop_path_draws": torch.float32,
    }


def test_to_moves_every_tensor():
    moved = make_batch().to("meta", non_blocking=True)
    for entry in dataclasses.fields(moved):
        value = getattr(moved, entry.name)
        assert not isinstance(value, torch.Tensor) or value.device.type == "meta", entry.name
    parts = moved.prefixes
    assert {parts.inside.device.type, parts.outside.device.type, parts.ends.device.type} == {"meta"}
    assert parts.lengths == (3,)
    assert (moved.sample_lengths, moved.weight_sum, moved.pack_id) == ((4,), 4.0, 7)


def test_batches_that_differ_in_anything_are_not_equal():
    batch = make_batch()
    assert batch == make_batch()
    for name, value in {
        "tokens": batch.tokens + 1,
        "tiles": batch.tiles[:0],
        "prefixes": dataclasses.replace(batch.prefixes, lengths=(2,)),
        "weight_sum": 5.0,
        "instructions": batch.prefixes,
    }.items():
        assert dataclasses.replace(batch, **{name: value}) != batch, name
    assert batch != batch.prefixes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pin_memory():
    pinned = make_batch().pin_memory()
    assert pinned.tokens.is_pinned() and pinned.tiles.is_pinned() and pinned.pack_id == 7
