"""Attention between queries and keys where Transformer Engine is not there, on torch's own kernels.

megatron-core's own attention without Transformer Engine refuses packed samples; these two stand in its place in the layer specs.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class TileAttention(nn.Module):
    """Every token of a tile sees every token of the same tile.

    Shapes: query, key and value [tokens of a tile, I, H, head size] -> [tokens of a tile, I, H * head size].
    """

    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **kwargs) -> Tensor:
        """Attend without a mask."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


class PackedCausalAttention(nn.Module):
    """Every token of a sample sees itself and what comes before it in the same sample, never another sample of the pack.

    Shapes: query [T, H, head size], key and value [T, key and value heads, head size] -> [T, H * head size].
    """

    def __init__(self, **kwargs):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *, packed_seq_params: PackedSeqParams, **kwargs
    ) -> Tensor:
        """Attend sample by sample."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        grouped = query.shape[1] != key.shape[1]
        samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attended = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in samples]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)
