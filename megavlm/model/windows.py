"""Sliding windows of attention."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


def window_of(config: TransformerConfig, layer_number: int) -> int:
    """Return how many tokens a query of a layer sees, the own one counted; 0: all before it.

    Args:
        config: megatron-core's configuration.
        layer_number: of the layer in the model, from 1.
    """
    has_window = is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    )
    return config.window_size[0] + 1 if has_window else 0


def is_hidden(distance: Tensor, window: int) -> Tensor:
    """Tell which keys queries do not see.

    Args:
        distance: how far the key is before the query; below 0 it is behind it.
        window: as of ``window_of``.

    Returns:
        bool, shaped like ``distance``.
    """
    hidden = distance < 0
    return hidden | (distance >= window) if window else hidden
