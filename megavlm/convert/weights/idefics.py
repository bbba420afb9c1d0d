"""The weights of IDEFICS's language model, as ``IdeficsForVisionText2Text`` names them: a Llama,
its gated cross-attention, and the rows of added tokens.

Shape letters: D hidden size, M hidden size of an MLP, V vocabulary, K added tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megavlm.config.schema import Architecture
from megavlm.convert.weights.families import llama
from megavlm.convert.weights.mapping import Row, linear, norm, within
from megavlm.convert.weights.transforms import Reshaped, Same


def rows(architecture: Architecture) -> list[Row]:
    """List the weights of the language model, with names as in files."""
    language = replace(architecture.language, vocab_size=architecture.table_rows)
    found = llama.rows(language)
    every = architecture.cross_attention.every
    for layer in range(0, language.num_layers, every):
        key = f"decoder.layers.{layer}.cross."
        name = f"model.gated_cross_attn_layers.{layer // every}."
        found += within(_block(architecture), key, name)
    added = (architecture.added_tokens, language.hidden_size)
    if architecture.added_tokens:
        embedding = "model.embed_tokens.additional_embedding.weight"
        found.append(Row("added_embedding.weight", (embedding,), added))
        found.append(Row("added_head.weight", ("lm_head.additional_fc.weight",), added))
    return found


def _block(architecture: Architecture) -> Iterator[Row]:
    """Yield the weights of one block, without prefixes."""
    language = architecture.language
    settings = architecture.cross_attention
    width = language.hidden_size
    inner = language.ffn_hidden_size
    heads = language.num_attention_heads * language.head_size
    memory = architecture.memory_size
    gate = Reshaped((1, 1, width), (width,)) if settings.gate == "vector" else Same()
    shape = (width,) if settings.gate == "vector" else (1,)
    yield from norm("norm.", "input_layernorm", width)
    yield from linear("linear_q", ("cross_attn.q_proj",), (heads, width), bias=False)
    for part in "kv":
        name = (f"cross_attn.{part}_proj",)
        yield from linear(f"linear_{part}", name, (heads, memory), bias=False)
    if settings.qk_norm:
        yield from norm("query_norm.", "cross_attn.q_layer_norm", language.head_size)
        yield from norm("key_norm.", "cross_attn.k_layer_norm", language.head_size)
    yield from linear("linear_proj", ("cross_attn.o_proj",), (width, heads), bias=False)
    yield Row("attention_gate", ("alpha_cross_attn",), shape, gate)
    yield from norm("mlp_norm.", "post_attention_layernorm", width)
    yield from llama.gated_mlp("mlp.", "mlp.", width, inner)
    yield Row("mlp_gate", ("alpha_dense",), shape, gate)
