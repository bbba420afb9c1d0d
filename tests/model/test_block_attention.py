"""Attention with soft caps, windows and prefixes against Gemma 2's in ``transformers``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megavlm.model import block_attention
from megavlm.model.attention import PackedSamples
from megavlm.model.block_attention import BlockAttention
from tests.model.test_sink_attention import ENDS, GROUPS, HEADS, LENGTHS, SIZE, _Alone

# Of the samples between ENDS: none, one of one token, longer than a window, of no sample, short.
PREFIXES = (0, 1, 13, 0, 3)
SCALE = 0.6
SOFTCAP = 0.8


def attention(window: int, layer: int) -> BlockAttention:
    config = SimpleNamespace(
        kv_channels=SIZE,
        window_size=(window - 1, 0) if window else None,
        window_attn_skip_freq=2,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = _Alone()
    return BlockAttention(config, layer, groups, SCALE, softcap=SOFTCAP)


def by_transformers(query: Tensor, key: Tensor, value: Tensor, window: int, prefix: int) -> Tensor:
    """Attend in one sample, from [T, heads, d]."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = nn.Module()
    module.num_key_value_groups = HEADS // GROUPS
    places = torch.arange(len(query))
    distance = places[:, None] - places
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    seen |= (places[:, None] < prefix) & (places < prefix)
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    inputs = (x.transpose(0, 1)[None] for x in (query, key, value))
    answer, _ = eager_attention_forward(
        module, *inputs, mask, scaling=SCALE, softcap=SOFTCAP, dropout=0.0
    )
    return answer[0].flatten(1)


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize("has_prefixes", [False, True])
@pytest.mark.parametrize(("window", "layer"), [(0, 1), (4, 1), (4, 2), (100, 3)])
def test_each_sample_of_a_pack_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, window: int, layer: int, has_prefixes: bool, block: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(block_attention, "_BLOCK", block)
    inputs = [
        torch.randn(ENDS[-1], heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]
    prefixes = PREFIXES if has_prefixes else tuple(0 for _ in PREFIXES)
    samples = PackedSamples(
        qkv_format="thd",
        query_lengths=LENGTHS,
        key_lengths=LENGTHS,
        prefixes=SimpleNamespace(lengths=prefixes) if has_prefixes else None,
    )
    ours = attention(window, layer)(*inputs, packed_seq_params=samples)
    seen = window if layer % 2 else 0
    theirs = torch.cat(
        [
            by_transformers(*(x[start:end] for x in inputs), seen, prefix)
            for start, end, prefix in zip(ENDS, ENDS[1:], prefixes, strict=False)
        ]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
