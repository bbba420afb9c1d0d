"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2 with experts in the place of the MLP of every
layer, and a shared expert beside them, whose output a gate weighs.
"""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.qwen3_moe import SOFTMAX_ROUTER, rows

FAMILY = Family(
    name="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    rows=rows,
    facts={"qkv_bias": True, "qk_norm": False, "shared_expert_gate": True, **SOFTMAX_ROUTER},
    settings={
        "qkv_bias": True,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    accepted={"mlp_only_layers": (None,), "qkv_bias": (None,)},
    has_head_dim=False,
    has_experts=True,
    expert_names={"shared_expert_ffn_hidden_size": "shared_expert_intermediate_size"},
)
