"""Attention of several heads, without the linear layers around it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[I, rows, H * d] -> [I, H, rows, d]"""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attend from queries [I, H, R, d] to keys and values [I, H, N, d] -> [I, R, H * d]; ``seen``
    [I or 1, 1, R, N] says which do, by default all.
    """
    found = scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return found.transpose(1, 2).flatten(2)
