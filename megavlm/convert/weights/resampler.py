"""The weights of a Perceiver resampler, as ``transformers`` names them in IDEFICS.

Shape letters: D width of the vision encoder, F latents, H d width of all heads, M hidden size of
an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Architecture
from megavlm.convert.weights.mapping import Row, linear, norm, within
from megavlm.convert.weights.transforms import Stacked


def rows(architecture: Architecture) -> list[Row]:
    """List the weights of the connector ``resampler``."""
    settings = architecture.connector.resampler
    width = architecture.vision.hidden_size
    found = [Row("latents", ("latents",), (settings.latents, width))]
    for number in range(settings.num_layers):
        found += within(_layer(architecture), f"layers.{number}.", f"blocks.{number}.")
    return [*found, *norm("norm.", "layer_norm", width, "LayerNorm")]


def _layer(architecture: Architecture) -> Iterator[Row]:
    """Yield the weights of one layer, without prefixes: its attention is ``0``, its MLP ``1``."""
    settings = architecture.connector.resampler
    width = architecture.vision.hidden_size
    heads = settings.num_attention_heads * settings.head_size
    inner = settings.inner_size(width)
    both = ("0.k_proj", "0.v_proj")
    yield from norm("tile_norm.", "0.context_layer_norm", width, "LayerNorm")
    yield from norm("latent_norm.", "0.latents_layer_norm", width, "LayerNorm")
    yield from linear("query", ("0.q_proj",), (heads, width), bias=False)
    yield from linear("key_value", both, (2 * heads, width), Stacked(2), bias=False)
    if settings.qk_norm:
        yield from norm("query_norm.", "0.q_layer_norm", settings.head_size, "LayerNorm")
        yield from norm("key_norm.", "0.k_layer_norm", settings.head_size, "LayerNorm")
    yield from linear("proj", ("0.output_proj",), (width, heads), bias=False)
    yield from norm("mlp_norm.", "1.ln", width, "LayerNorm")
    yield from linear("up", ("1.fc",), (inner, width), bias=False)
    yield from linear("down", ("1.c_proj",), (width, inner), bias=False)
