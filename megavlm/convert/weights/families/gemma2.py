"""Gemma 2 (Gemma Team, arXiv 2408.00118), of 2B, 9B and 27B: a Gemma with norms behind attention
and MLP, too, soft caps, and sliding windows in every other layer.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families import gemma
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.families.llama import attention, gated_mlp
from megavlm.convert.weights.mapping import Row, norm


def rows(language: Language) -> list[Row]:
    """Build the table of Gemma 2."""
    return decoder(language, _layer(language))


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    return [
        *attention(language),
        *norm("post_attention_norm.", "post_attention_layernorm", width),
        *norm("mlp.linear_fc1.layer_norm_", "pre_feedforward_layernorm", width),
        *gated_mlp("mlp.", "mlp.", width, language.ffn_hidden_size),
        *norm("post_mlp_norm.", "post_feedforward_layernorm", width),
    ]


FAMILY = Family(
    name="gemma2",
    class_name="Gemma2ForCausalLM",
    rows=rows,
    facts={**gemma.FAMILY.facts, "sandwich_norm": True, "window_attn_skip_freq": 2},
    settings={
        **gemma.FAMILY.settings,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    accepted=gemma.FAMILY.accepted,
    stated={
        "window_size": "sliding_window",
        "attention_softcap": "attn_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
    },
)
