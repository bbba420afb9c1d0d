"""Attention between queries and keys where Transformer Engine is not there, on torch's own kernels.

megatron-core's own attention without Transformer Engine refuses packed samples; these two stand in
its place in the layer specs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megavlm.parallel.context_parallel import gather_tokens, own_positions


@dataclass
class PackedSamples(PackedSeqParams):
    """Where samples end in a pack, for attention and rotary embedding.

    Args:
        pad_between_seqs: whether padding stands between samples. Transformer Engine compares both
            kinds of ends on the device and waits for the answer, unless it is told.
    """

    pad_between_seqs: bool = False


class TileAttention(nn.Module):
    """Every token of a tile sees every token of the same tile.

    Shapes: query, key and value [tokens of a tile, I, H, head size] -> [tokens of a tile, I, H *
    head size].
    """

    def __init__(self, **kwargs):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **kwargs
    ) -> Tensor:
        """Attend without a mask."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


class PackedAttention(nn.Module):
    """Every token of a sample sees itself and, in the same sample, what comes before it or, without
    a causal mask, everything; never another sample of the pack.

    Where ranks share the pack, each brings together the keys and values of all tokens, and attends
    with its own queries.

    Shapes: query [T, H, head size], key and value [T, key and value heads, head size] -> [T, H *
    head size]; T tokens of this rank.

    Args:
        attn_mask_type: causal, or no mask, for which the pack must belong to one rank.
        pg_collection: process groups; without them the pack belongs to this rank alone.
    """

    def __init__(
        self,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs,
    ):
        super().__init__()
        self.is_causal = attn_mask_type is AttnMaskType.causal
        self.group = (
            pg_collection.cp if pg_collection is not None and pg_collection.cp.size() > 1 else None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **kwargs,
    ) -> Tensor:
        """Attend sample by sample."""
        ends = packed_seq_params.cu_seqlens_q
        grouped = query.shape[1] != key.shape[1]
        lengths = ends.diff().tolist()
        if self.group is not None:
            return self._attend_to_all(query, key, value, ends, grouped)
        samples = zip(
            *(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True
        )
        attended = [
            scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, enable_gqa=grouped)
            for q, k, v in samples
        ]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def _attend_to_all(
        self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, grouped: bool
    ) -> Tensor:
        lengths = ends.diff()
        ends = ends.numpy()
        positions = own_positions(ends, self.group)
        key, value = gather_tokens(torch.cat([key, value], dim=-1), ends, self.group).split(
            (key.shape[-1], value.shape[-1]), dim=-1
        )
        own = (lengths // self.group.size()).tolist()
        whole = lengths.tolist()
        parts = (
            *(
                x.transpose(0, 1).split(sizes, dim=1)
                for x, sizes in ((query, own), (key, whole), (value, whole))
            ),
            positions.split(own),
        )
        attended = []
        for q, k, v, position, start in zip(*parts, ends[:-1], strict=True):
            seen = position[:, None] >= torch.arange(start, start + k.shape[1])
            attended.append(
                scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
            )
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)
