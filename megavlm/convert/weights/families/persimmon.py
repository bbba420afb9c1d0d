"""Persimmon, the decoder of Fuyu (Adept, 2023; no paper): LayerNorm and biases everywhere, also on
the queries and keys of each head, half of which are rotated, and a squared ReLU without a gate.

``query_key_value`` holds a query, a key and a value for each head: the order in which megatron-core
keeps them too. Shape letters: D hidden size, M hidden size of the MLP.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.mapping import Row, linear, norm


def rows(language: Language) -> list[Row]:
    """Build the table of Persimmon."""
    return decoder(language, _layer(language), last_norm="final_layernorm")


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    inner = language.ffn_hidden_size
    size = language.head_size
    kind = "LayerNorm"
    qkv = ("self_attn.query_key_value",)
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "input_layernorm", width, kind),
        *linear("self_attention.linear_qkv", qkv, (3 * width, width)),
        *norm("self_attention.q_layernorm.", "self_attn.q_layernorm", size, kind),
        *norm("self_attention.k_layernorm.", "self_attn.k_layernorm", size, kind),
        *linear("self_attention.linear_proj", ("self_attn.dense",), (width, width)),
        *norm("mlp.linear_fc1.layer_norm_", "post_attention_layernorm", width, kind),
        *linear("mlp.linear_fc1", ("mlp.dense_h_to_4h",), (inner, width)),
        *linear("mlp.linear_fc2", ("mlp.dense_4h_to_h",), (width, inner)),
    ]


FAMILY = Family(
    name="persimmon",
    class_name="PersimmonForCausalLM",
    rows=rows,
    facts={"qkv_bias": True, "qk_norm": True, "activation": "relu2", "rotary_percent": 0.5},
    settings={"hidden_act": "relu2", "qk_layernorm": True},
    has_head_dim=False,
    has_groups=False,
    norm_epsilon="layer_norm_eps",
)
