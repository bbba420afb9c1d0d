"""InternLM2 and InternLM2.5 (Cai et al., arXiv 2403.17297): Llama with fused queries, keys and
values, and names of its own.

``wqkv`` holds, for each key-value head, its query heads, the key and the value: the order in which
megatron-core keeps them too. ``transformers`` has no such class, and takes the same model as a
Llama.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.mapping import Row, linear, norm
from megavlm.convert.weights.transforms import Stacked


def rows(language: Language) -> list[Row]:
    """Build the table of InternLM2."""
    return decoder(language, _layer(language), embedding="tok_embeddings", head="output")


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    inner = language.ffn_hidden_size
    size = language.head_size
    heads = language.num_attention_heads
    groups = language.num_query_groups
    return [
        *norm("self_attention.linear_qkv.layer_norm_", "attention_norm", width),
        *linear(
            "self_attention.linear_qkv",
            ("attention.wqkv",),
            ((heads + 2 * groups) * size, width),
            bias=False,
        ),
        *linear("self_attention.linear_proj", ("attention.wo",), (width, heads * size), bias=False),
        *norm("mlp.linear_fc1.layer_norm_", "ffn_norm", width),
        *linear(
            "mlp.linear_fc1",
            ("feed_forward.w1", "feed_forward.w3"),
            (2 * inner, width),
            Stacked(2),
            bias=False,
        ),
        *linear("mlp.linear_fc2", ("feed_forward.w2",), (width, inner), bias=False),
    ]


FAMILY = Family(
    name="internlm2",
    class_name="InternLM2ForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": False},
    settings={"bias": False},
    has_head_dim=False,
    native="llama",
)
