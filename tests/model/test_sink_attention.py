"""Attention with sinks and windows against ``transformers``' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megavlm.config.schema import Language
from megavlm.convert.hf import gpt_oss_config
from megavlm.model import block_attention, yarn
from megavlm.model.attention import PackedSamples
from megavlm.model.sink_attention import SinkAttention

HEADS = 6
GROUPS = 2
SIZE = 8
ENDS = (0, 9, 10, 30, 30, 41)
LENGTHS = (9, 1, 20, 0, 11)


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def attention(window: int, layer: int) -> SinkAttention:
    config = SimpleNamespace(
        kv_channels=SIZE,
        window_size=(window - 1, 0) if window else None,
        window_attn_skip_freq=2,
        num_attention_heads=HEADS,
        params_dtype=torch.float32,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = _Alone()
    found = SinkAttention(config, layer, groups)
    found.softmax_offset.data = torch.randn(HEADS)
    return found


def by_transformers(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, window: int
) -> Tensor:
    """Attend in one sample, from [T, heads, d]."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = nn.Module()
    module.sinks = sinks
    module.num_key_value_groups = HEADS // GROUPS
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    inputs = (x.transpose(0, 1)[None] for x in (query, key, value))
    answer, _ = eager_attention_forward(module, *inputs, mask, SIZE**-0.5)
    return answer[0].flatten(1)


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize(("window", "layer"), [(0, 1), (4, 1), (4, 2), (100, 3)])
def test_each_sample_of_a_pack_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, window: int, layer: int, block: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(block_attention, "_BLOCK", block)
    module = attention(window, layer)
    inputs = [
        torch.randn(ENDS[-1], heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]
    samples = PackedSamples(qkv_format="thd", query_lengths=LENGTHS, key_lengths=LENGTHS)
    ours = module(*inputs, packed_seq_params=samples)
    sinks = module.softmax_offset.detach().clone().requires_grad_()
    seen = window if layer % 2 else 0
    theirs = torch.cat(
        [
            by_transformers(*(x[start:end] for x in inputs), sinks, seen)
            for start, end in zip(ENDS, ENDS[1:], strict=False)
        ]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), [*inputs, module.softmax_offset])
    expected = torch.autograd.grad((theirs * weights).sum(), [*inputs, sinks])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_matrix_of_all_pairs_of_tokens_is_kept() -> None:
    tokens = 2000
    inputs = [
        torch.randn(tokens, heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]
    samples = PackedSamples(qkv_format="thd", query_lengths=(tokens,), key_lengths=(tokens,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        attention(0, 2)(*inputs, packed_seq_params=samples)
    assert max(kept, default=0) < tokens * HEADS * SIZE + 1


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("factor", "positions"), [(32.0, 4096), (4.0, 64), (8.0, 20)])
def test_yarn_is_that_of_transformers(factor: float, positions: int, truncate: bool) -> None:
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    language = Language(
        kv_channels=SIZE * 8,
        rotary_base=150000.0,
        rotary_yarn_factor=factor,
        rotary_yarn_positions=positions,
        rotary_yarn_truncate=truncate,
    )
    scaling = gpt_oss_config.write(language)["rope_parameters"]
    config = GptOssConfig(head_dim=SIZE * 8, rope_parameters=scaling)
    expected, growth = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(yarn.frequencies(language), expected, rtol=1e-6, atol=0)
    assert yarn.product_scale(language) == pytest.approx(growth**2 / (SIZE * 8) ** 0.5)
