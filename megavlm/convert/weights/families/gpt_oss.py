"""GPT-OSS (arXiv 2508.10925): Llama with biases, attention sinks, sliding windows in every other
layer, and experts with a clamped gate.

Files hold the experts of a layer together. The table has those of each expert by itself;
``megavlm/convert/weights/joined_experts.py`` stands between the two.

Shape letters: D hidden size, M hidden size of an expert, E experts.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.families.llama import attention
from megavlm.convert.weights.mapping import Row, linear, norm
from megavlm.convert.weights.transforms import Interleaved, Transposed


def rows(language: Language) -> list[Row]:
    """Build the table of GPT-OSS."""
    return decoder(language, _layer(language))


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    heads = (language.num_attention_heads,)
    shape = (language.num_experts, width)
    return [
        *attention(language),
        Row("self_attention.core_attention.softmax_offset", ("self_attn.sinks",), heads),
        *norm("pre_mlp_layernorm.", "post_attention_layernorm", width),
        *linear("mlp.router", ("mlp.router",), shape),
        *(row for number in range(language.num_experts) for row in _expert(language, number)),
    ]


def _expert(language: Language, number: int) -> list[Row]:
    width = language.hidden_size
    inner = language.expert_ffn_hidden_size
    key = f"mlp.experts.{number}."
    return [
        Row(f"{key}linear_fc1.weight", (f"{key}gate_up_proj",), (2 * inner, width), Interleaved()),
        Row(f"{key}linear_fc1.bias", (f"{key}gate_up_proj_bias",), (2 * inner,), Interleaved()),
        Row(f"{key}linear_fc2.weight", (f"{key}down_proj",), (width, inner), Transposed()),
        Row(f"{key}linear_fc2.bias", (f"{key}down_proj_bias",), (width,)),
    ]


FAMILY = Family(
    name="gpt_oss",
    class_name="GptOssForCausalLM",
    rows=rows,
    facts={
        "qkv_bias": True,
        "qk_norm": False,
        "linear_bias": True,
        "attention_sinks": True,
        "window_attn_skip_freq": 2,
        "activation": "clamped_quick_geglu",
        "norm_topk_prob": True,
        "router_scores": "softmax",
        "router_bias": False,
        "routed_scaling": 1.0,
        "shared_expert_gate": False,
    },
    settings={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    has_experts=True,
    stated={"rotary_yarn_factor": "rope_scaling.factor"},
)
