"""Phi-3 (Abdin et al., arXiv 2404.14219) and Phi-4, without a sliding window and with plain rotary
positions: Llama with fused queries, keys and values, and a fused gate.

``qkv_proj`` holds all queries, then all keys, then all values; ``gate_up_proj`` the gate, then the
other half, as megatron-core keeps them too.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.mapping import Row, linear, norm
from megavlm.convert.weights.transforms import Fused, GroupedQKV


def rows(language: Language) -> list[Row]:
    """Build the table of Phi-3."""
    return decoder(language, _layer(language))


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    inner = language.ffn_hidden_size
    size = language.head_size
    heads = language.num_attention_heads
    groups = language.num_query_groups
    counts = tuple(count * size for count in (heads, groups, groups))
    fused = Fused(GroupedQKV(heads, groups, size), counts)
    qkv = ("self_attn.qkv_proj",)
    proj = ("self_attn.o_proj",)
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "input_layernorm", width),
        *linear("self_attention.linear_qkv", qkv, (sum(counts), width), fused, bias=False),
        *linear("self_attention.linear_proj", proj, (width, heads * size), bias=False),
        *norm("mlp.linear_fc1.layer_norm_", "post_attention_layernorm", width),
        *linear("mlp.linear_fc1", ("mlp.gate_up_proj",), (2 * inner, width), bias=False),
        *linear("mlp.linear_fc2", ("mlp.down_proj",), (width, inner), bias=False),
    ]


FAMILY = Family(
    name="phi3",
    class_name="Phi3ForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": False},
    settings={"sliding_window": None},
    has_head_dim=False,
)
