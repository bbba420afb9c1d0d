"""Gemma (Gemma Team, arXiv 2403.08295), of 2B and 7B: Llama's names, norms that multiply by 1 plus
their weight, a gate with GELU, and token embeddings times the square root of their width.
"""

from __future__ import annotations

from megavlm.convert.weights.families.family import Family
from megavlm.convert.weights.families.llama import rows

FAMILY = Family(
    name="gemma",
    class_name="GemmaForCausalLM",
    rows=rows,
    facts={
        "qkv_bias": False,
        "qk_norm": False,
        "activation": "geglu_tanh",
        "zero_centered_norm": True,
        "scaled_embedding": True,
    },
    settings={
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    # transformers takes the GELU of the first folders for the approximation, too.
    accepted={"hidden_act": ("gelu",), "use_bidirectional_attention": (False,)},
)
