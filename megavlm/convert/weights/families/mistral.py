"""Mistral without a sliding window (7B from v0.2 on): Llama under another name."""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.llama import rows

FAMILY = Family(
    name="mistral",
    class_name="MistralForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": False},
    settings={"sliding_window": None},
    chat="llama",
)
