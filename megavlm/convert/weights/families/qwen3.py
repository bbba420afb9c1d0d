"""Qwen3 (arXiv 2505.09388): Llama with a norm on the queries and keys of each head."""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.llama import rows

FAMILY = Family(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": True},
    settings={"attention_bias": False, "use_sliding_window": False},
)
