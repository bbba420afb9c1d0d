"""Qwen2 and Qwen2.5 (arXiv 2412.15115): Llama with a bias on queries, keys and values."""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.llama import rows

FAMILY = Family(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    rows=rows,
    facts={"qkv_bias": True, "qk_norm": False},
    settings={"use_sliding_window": False},
    has_head_dim=False,
)
