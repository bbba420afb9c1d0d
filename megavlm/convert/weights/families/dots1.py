"""dots.llm1 (arXiv 2506.05767): the attention of Qwen3, and DeepSeek-V3's mixture of experts, with
sigmoid scores, a bias for the choice, and shared experts. Published models have one layer without
experts in front, which is refused.
"""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.qwen3_moe import rows

FAMILY = Family(
    name="dots1",
    class_name="Dots1ForCausalLM",
    rows=rows,
    facts={
        "qkv_bias": False,
        "qk_norm": True,
        "router_scores": "sigmoid",
        "router_bias": True,
        "shared_expert_gate": False,
    },
    settings={
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": None,
    },
    has_head_dim=False,
    has_experts=True,
    expert_names={
        "num_experts": "n_routed_experts",
        "routed_scaling": "routed_scaling_factor",
        "shared_expert_ffn_hidden_size": "n_shared_experts",
    },
    counts_shared=True,
)
