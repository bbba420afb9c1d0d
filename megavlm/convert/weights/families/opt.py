"""OPT (Zhang et al., arXiv 2205.01068), but for the two sizes that project their embeddings or
normalise behind residual sums (350M).

Shape letters: D hidden size, H heads, M hidden size of the MLP, V vocabulary.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.mapping import Row, linear, norm
from megavlm.convert.weights.transforms import GroupedQKV

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def rows(language: Language) -> list[Row]:
    """Build the table of OPT."""
    start = "model.decoder."
    words, *others = decoder(language, _layer(language), start=start, last_norm="final_layer_norm")
    positions = Row(
        "embedding.position_embeddings.weight",
        (f"{start}embed_positions.weight",),
        (language.position_rows, language.hidden_size),
    )
    return [words, positions, *others]


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    inner = language.ffn_hidden_size
    heads = language.num_attention_heads
    qkv = GroupedQKV(heads, heads, width // heads)
    before = "self_attn_layer_norm"
    return [
        *norm("self_attention.linear_qkv.layer_norm_", before, width, "LayerNorm"),
        *linear("self_attention.linear_qkv", _PROJECTIONS, (3 * width, width), qkv),
        *linear("self_attention.linear_proj", ("self_attn.out_proj",), (width, width)),
        *norm("mlp.linear_fc1.layer_norm_", "final_layer_norm", width, "LayerNorm"),
        *linear("mlp.linear_fc1", ("fc1",), (inner, width)),
        *linear("mlp.linear_fc2", ("fc2",), (width, inner)),
    ]


FAMILY = Family(
    name="opt",
    class_name="OPTForCausalLM",
    rows=rows,
    facts={
        "qkv_bias": True,
        "qk_norm": False,
        "activation": "relu",
        "layernorm_epsilon": 1e-5,
    },
    settings={
        "hidden_act": "relu",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    has_head_dim=False,
    has_groups=False,
)
