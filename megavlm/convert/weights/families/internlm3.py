"""InternLM3: Llama with a width of heads of its own."""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.llama import rows

FAMILY = Family(
    name="internlm3",
    class_name="InternLM3ForCausalLM",
    rows=rows,
    facts={"qkv_bias": False, "qk_norm": False},
    settings={"bias": False, "qkv_bias": False},
    native="llama",
)
