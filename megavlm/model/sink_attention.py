"""Attention with learned sinks and sliding windows (GPT-OSS), on torch's own operations.

A sink (Xiao et al., arXiv 2309.17453) is a learned number of each head, which the softmax of every
query has beside the products with the keys: a query need not attend to anything. Transformer Engine
has no kernel with sinks for packed samples.

Shape letters: T tokens of the pack on this rank, H query heads, G key and value heads, Q queries
and K keys of a block, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megavlm.model.attention import PackedSamples
from megavlm.model.windows import is_hidden, window_of
from megavlm.parallel.context_parallel import gather_tokens

_BLOCK = 1024
"""Queries whose products with keys are in memory at once."""


class SinkAttention(nn.Module):
    """Every token of a sample sees itself and, in the same sample, what comes before it, in some
    layers only the last tokens of that; never another sample of the pack.

    Context-parallel ranks each bring together the keys and values of all tokens, and attend with
    their own queries. Products with keys are computed again in the backward pass.

    Shapes: query [T, H, d], key and value [T, G, d] -> [T, H * d].

    Args:
        config: megatron-core's configuration. ``window_size`` and ``window_attn_skip_freq`` say
            which layers have windows, of ``window_size[0] + 1`` tokens.
        layer_number: of the layer in the model, from 1.
        softmax_scale: factor of the products; none: 1 / sqrt(d).
        pg_collection: process groups.
        kwargs: what megatron-core gives all kinds of attention.

    Attributes:
        softmax_offset: the sinks of this rank's heads [H], under the name that megatron-core's own
            attention gives them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.tensor_group = pg_collection.tp
        self.context_group = pg_collection.cp
        self.window = window_of(config, layer_number)
        heads = config.num_attention_heads // self.tensor_group.size()
        self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSamples,
        **kwargs: Any,
    ) -> Tensor:
        """Attend sample by sample; ``Attention.forward`` of megatron-core calls this."""
        ends = packed_seq_params.cu_seqlens_q
        lengths = ends.diff().tolist()
        ranks = self.context_group.size()
        if ranks > 1:
            joined = torch.cat([key, value], dim=-1)
            joined = gather_tokens(joined, ends.cpu().numpy(), self.context_group)
            key, value = joined.split((key.shape[-1], value.shape[-1]), dim=-1)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        samples = zip(
            lengths,
            query.split([length // ranks for length in lengths], dim=1),
            key.split(lengths, dim=1),
            value.split(lengths, dim=1),
            strict=True,
        )
        attended = [
            self._attend(block, keys, values, first)
            for length, queries, keys, values in samples
            for first, block in _blocks(queries, length, self.context_group)
        ]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        """Attend with consecutive queries [H, Q, d] of a sample, from the one at ``first`` on, to
        the keys and values [G, tokens of the sample, d] -> [H, Q, d].
        """
        end = first + query.shape[1]
        start = max(first - self.window + 1, 0) if self.window else 0
        return checkpoint(
            attend_to_block,
            query,
            key[:, start:end],
            value[:, start:end],
            self.softmax_offset,
            first - start,
            self.window,
            self.scale,
            use_reentrant=False,
            preserve_rng_state=False,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """Describe the sinks as sharded over the tensor-parallel ranks, as the heads are;
        megatron-core calls this when it saves or loads a checkpoint.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def _blocks(queries: Tensor, length: int, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Cut this rank's queries of a sample [H, tokens of this rank, d] into consecutive ones.

    Args:
        queries: in the order of ``RankSlice.tokens``.
        length: tokens of the sample on all ranks.
        group: context-parallel ranks.

    Yields:
        The place in the sample of the first of some queries, and these [H, Q, d].
    """
    rank = group.rank()
    ranks = group.size()
    if not length:
        return
    pieces = [(0, queries)]
    if ranks > 1:
        size = length // (2 * ranks)
        places = (rank * size, (2 * ranks - 1 - rank) * size)
        pieces = list(zip(places, queries.split(size, dim=1), strict=True))
    for first, piece in pieces:
        for block in piece.split(_BLOCK, dim=1):
            yield first, block
            first += block.shape[1]


def attend_to_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    first: int,
    window: int,
    scale: float,
) -> Tensor:
    """Attend with consecutive queries to the keys before and among them, and to the sinks.

    Args:
        query: [H, Q, d]
        key, value: [G, K, d]
        sinks: [H]
        first: place among the keys of the key of the first query.
        window: tokens that a query sees, the own one counted; 0: all before it.
        scale: factor of the products.

    Returns:
        [H, Q, d]
    """
    heads, queries, _ = query.shape
    groups, keys, size = value.shape
    scores = torch.matmul(query.reshape(groups, -1, size), key.transpose(1, 2))
    distance = (torch.arange(queries)[:, None] + first - torch.arange(keys)).to(query.device)
    hidden = is_hidden(distance, window)
    scores = (scores.view(heads, queries, keys).float() * scale).masked_fill(hidden, float("-inf"))
    beside = sinks.float()[:, None, None].expand(heads, queries, 1)
    shares = torch.cat([scores, beside], dim=-1).softmax(-1)[..., :-1].to(value.dtype)
    return torch.matmul(shares.reshape(groups, -1, keys), value).view(heads, queries, size)
