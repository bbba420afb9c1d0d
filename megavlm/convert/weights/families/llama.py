"""Llama (Touvron et al., arXiv 2302.13971), Vicuna and whatever else is written in its format.

Shape letters: D hidden size, H query heads, G query groups, d width of a head, M hidden size of the
MLP, V vocabulary.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.mapping import Row, linear, norm
from megavlm.convert.weights.transforms import GroupedQKV, Stacked


def rows(language: Language) -> list[Row]:
    """Build the table of Llama, with the biases and the query and key norms that its relatives
    add.
    """
    return decoder(language, _layer(language))


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    return [
        *attention(language),
        *norm("mlp.linear_fc1.layer_norm_", "post_attention_layernorm", width),
        *gated_mlp("mlp.", "mlp.", width, language.ffn_hidden_size),
    ]


def gated_mlp(key: str, name: str, width: int, inner: int) -> list[Row]:
    """Build the table of a gated MLP.

    Args:
        key, name: what its keys and names begin with.
        width: D.
        inner: M.
    """
    first = (f"{name}gate_proj", f"{name}up_proj")
    return [
        *linear(f"{key}linear_fc1", first, (2 * inner, width), Stacked(2), bias=False),
        *linear(f"{key}linear_fc2", (f"{name}down_proj",), (width, inner), bias=False),
    ]


def attention(language: Language) -> list[Row]:
    """Build the table of a layer's attention and the norm before it."""
    width = language.hidden_size
    size = language.head_size
    heads = language.num_attention_heads
    groups = language.num_query_groups
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv = ((heads + 2 * groups) * size, width)
    norms = [
        *norm("self_attention.q_layernorm.", "self_attn.q_norm", size),
        *norm("self_attention.k_layernorm.", "self_attn.k_norm", size),
    ]
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "input_layernorm", width),
        *linear(
            "self_attention.linear_qkv",
            projections,
            qkv,
            GroupedQKV(heads, groups, size),
            bias=language.qkv_bias,
        ),
        *(norms if language.qk_norm else []),
        *linear(
            "self_attention.linear_proj",
            ("self_attn.o_proj",),
            (width, heads * size),
            bias=language.linear_bias,
        ),
    ]


FAMILY = Family(
    name="llama",
    class_name="LlamaForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": False},
    settings={"attention_bias": False, "mlp_bias": False},
)
