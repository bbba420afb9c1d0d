"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in the place of the MLP of every layer.

Files of transformers 4 and 5 hold three matrices of each expert; a file that holds the experts of a
layer as two tensors, as transformers 5 does in memory, is read too, and files of Qwen3-VL hold them
so (``megavlm/convert/weights/fused_experts.py``).
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families.family import Family, decoder
from megavlm.convert.weights.families.llama import attention, gated_mlp
from megavlm.convert.weights.mapping import Row, norm

SOFTMAX_ROUTER = {"router_scores": "softmax", "router_bias": False, "routed_scaling": 1.0}


def rows(language: Language) -> list[Row]:
    """Build the table of Qwen3-MoE, and of families with a bias of the router or a shared expert
    beside.
    """
    return decoder(language, _layer(language))


def _layer(language: Language) -> list[Row]:
    width = language.hidden_size
    inner = language.expert_ffn_hidden_size
    shape = (language.num_experts, width)
    return [
        *attention(language),
        *norm("pre_mlp_layernorm.", "post_attention_layernorm", width),
        Row("mlp.router.weight", ("mlp.gate.weight",), shape),
        *_bias(language),
        *_shared(language),
        *(
            row
            for number in range(language.num_experts)
            for row in gated_mlp(f"mlp.experts.{number}.", f"mlp.experts.{number}.", width, inner)
        ),
    ]


def _bias(language: Language) -> list[Row]:
    """Build the row of the bias that DeepSeek-V3's router chooses with."""
    names = ("mlp.gate.e_score_correction_bias",)
    row = Row("mlp.router.expert_bias", names, (language.num_experts,), keeps_dtype=True)
    return [row] if language.router_bias else []


def _shared(language: Language) -> list[Row]:
    """Build the rows of the shared expert: one with a gate, of Qwen2-MoE, or several as one."""
    inner = language.shared_expert_ffn_hidden_size
    width = language.hidden_size
    if not inner:
        return []
    if not language.shared_expert_gate:
        return gated_mlp("mlp.shared_experts.", "mlp.shared_experts.", width, inner)
    gate = Row("mlp.shared_experts.gate_weight", ("mlp.shared_expert_gate.weight",), (1, width))
    return [*gated_mlp("mlp.shared_experts.", "mlp.shared_expert.", width, inner), gate]


FAMILY = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": True, **SOFTMAX_ROUTER, "shared_expert_gate": False},
    settings={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    accepted={"mlp_only_layers": (None,)},
    has_experts=True,
)
