"""Attention of a prefix-LM in packs: two calls a sample against a dense mask."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from megavlm.data.loading.prefixes import find_prefixes
from megavlm.model.attention import PackedAttention, PackedSamples

HEADS = 4
GROUPS = 2
SIZE = 6


def supervised_in(prefixes: list[int], lengths: list[int]) -> np.ndarray:
    """Mark the tokens of samples from each prefix's end on."""
    found = [np.arange(n) >= prefix for prefix, n in zip(prefixes, lengths, strict=True)]
    return np.concatenate(found)


# The last sample has no answer, and one has nothing but.
LENGTHS = [8, 10, 3, 1, 5]
PREFIXES = [5, 4, 0, 0, 5]


@pytest.fixture(scope="module")
def samples() -> PackedSamples:
    supervised = supervised_in(PREFIXES, LENGTHS)
    ends = np.append(0, np.cumsum(LENGTHS)).astype(np.int32)
    prefixes = find_prefixes(supervised, np.arange(sum(LENGTHS)), ends)
    assert prefixes.ends.diff().tolist() == [5, 4, 1, 1, 1]
    everything = torch.cat([prefixes.inside, prefixes.outside])
    assert sorted(everything.tolist()) == list(range(sum(LENGTHS)))
    found = torch.from_numpy(ends)
    packed = PackedSamples(
        qkv_format="thd",
        cu_seqlens_q=found,
        cu_seqlens_kv=found,
        max_seqlen_q=max(LENGTHS),
        query_lengths=tuple(LENGTHS),
        key_lengths=tuple(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
        prefixes=prefixes,
    )
    assert (packed.of_prefixes().max_seqlen_q, packed.of_rest().max_seqlen_q) == (5, 6)
    return packed


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    *,
    has_prefixes: bool = True,
) -> torch.Tensor:
    """Attend with one mask over the whole pack."""
    tokens = len(query)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    start = 0
    for length, prefix in zip(LENGTHS, PREFIXES, strict=True):
        # Without an answer a sample is causal.
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if has_prefixes and prefix < length:
            seen[:prefix, :prefix] = True
        mask[start : start + length, start : start + length] = seen
        start += length
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scale = 1 / math.sqrt(SIZE) if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    shares = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, value).flatten(1)


@pytest.mark.parametrize("scale", [None, 0.9])
def test_two_calls_a_sample_are_a_dense_mask(samples: PackedSamples, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(
            sum(LENGTHS), heads, SIZE, dtype=torch.float64, generator=generator, requires_grad=True
        )
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    attention = PackedAttention(softmax_scale=scale)
    ours = attention(*inputs, packed_seq_params=samples)
    theirs = dense(*inputs, scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(ours, inputs, weights)
    expected = torch.autograd.grad(theirs, inputs, weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    ours = attention(*inputs, packed_seq_params=dataclasses.replace(samples, prefixes=None))
    theirs = dense(*inputs, scale, has_prefixes=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_padding_between_stored_samples_belongs_to_the_sample_before_it() -> None:
    # Samples of 3 and 5 tokens at multiples of 4, and a padding sample of 4.
    positions = np.array([0, 1, 2, 4, 5, 6, 7, 8])
    supervised = np.array([False, True, True, False, False, False, True, True])
    found = find_prefixes(supervised, positions, np.array([0, 4, 12, 16], np.int32))
    assert found.inside.tolist() == [0, 4, 5, 6, 12]
    assert found.ends.tolist() == [0, 1, 4, 5]
    assert found.outside.tolist() == [1, 2, 3, 7, 8, 9, 10, 11, 13, 14, 15]


def test_transformer_engine_is_called_twice_with_its_names_of_masks(
    samples: PackedSamples,
) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megavlm.model.transformer_engine import of_packs

    calls = []

    class Attention(torch.nn.Module):
        """Stands for Transformer Engine's; computes as the local one."""

        def __init__(self) -> None:
            super().__init__()
            self.kept_packed_seq_params: set[str] = set()

        def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params):
            told = packed_seq_params
            calls.append((attn_mask_type.name, len(query), told.max_seqlen_q))
            assert told.prefixes is None
            for ends, lengths, longest in (
                (told.cu_seqlens_q, told.query_lengths, told.max_seqlen_q),
                (told.cu_seqlens_kv, told.key_lengths, told.max_seqlen_kv),
            ):
                assert tuple(ends.diff().tolist()) == lengths and longest == max(lengths)
            return query.flatten(1)

    module = of_packs(Attention)()
    assert repr(module) == "OfPacksAttention()"
    inputs = [torch.randn(sum(LENGTHS), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    found = module(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=samples)
    assert torch.equal(found, inputs[0].flatten(1)), "rows return to their places"
    assert calls == [("no_mask", 12, 5), ("padding_causal_bottom_right", 15, 6)]
    assert module.kept_packed_seq_params == {"pad_between_seqs"}
