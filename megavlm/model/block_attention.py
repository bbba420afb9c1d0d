"""Attention with sliding windows and soft caps (Gemma 2, arXiv 2408.00118), on torch's own
operations, for a block of queries at a time.

Transformer Engine has no kernel with a soft cap or with sinks for packed samples.

Shape letters: T tokens of the pack on this rank, H query heads, G key and value heads, Q queries
and K keys of a block, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megavlm.model.attention import PackedSamples
from megavlm.model.windows import is_hidden, window_of
from megavlm.parallel.context_parallel import ends_of, gather_tokens

_BLOCK = 1024
"""Queries whose products with keys are in memory at once."""


class BlockAttention(nn.Module):
    """Every token of a sample sees itself and, in the same sample, what comes before it, in some
    layers only the last tokens of that; in a prefix, the whole prefix, with windows, too, as in
    PaliGemma 2; never another sample of the pack.

    Context-parallel ranks each bring together the keys and values of all tokens, and attend with
    their own queries. Products with keys are computed again in the backward pass.

    Shapes: query [T, H, d], key and value [T, G, d] -> [T, H * d].

    Args:
        config: megatron-core's configuration. ``window_size`` and ``window_attn_skip_freq`` say
            which layers have windows, of ``window_size[0] + 1`` tokens.
        layer_number: of the layer in the model, from 1.
        pg_collection: process groups.
        softmax_scale: factor of the products; none: 1 / sqrt(d).
        softcap: bound of the products after that; 0: none.
        kwargs: what megatron-core gives all kinds of attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__()
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.softcap = softcap
        self.context_group = pg_collection.cp
        self.window = window_of(config, layer_number)

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
        lengths = packed_seq_params.query_lengths
        prefixes = (0,) * len(lengths)
        if packed_seq_params.prefixes is not None:
            prefixes = packed_seq_params.prefixes.lengths
        ranks = self.context_group.size()
        if ranks > 1:
            joined = torch.cat([key, value], dim=-1)
            joined = gather_tokens(joined, ends_of(lengths), self.context_group)
            key, value = joined.split((key.shape[-1], value.shape[-1]), dim=-1)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        samples = zip(
            lengths,
            query.split([length // ranks for length in lengths], dim=1),
            key.split(lengths, dim=1),
            value.split(lengths, dim=1),
            prefixes,
            strict=True,
        )
        attended = [
            self._attend(block, keys, values, first, prefix)
            for length, queries, keys, values, prefix in samples
            for first, block in _blocks(queries, length, self.context_group)
        ]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, first: int, prefix: int) -> Tensor:
        """Attend with consecutive queries [H, Q, d] of a sample, from the one at ``first`` on, to
        the keys and values [G, tokens of the sample, d], of which ``prefix`` are a prefix -> [H, Q,
        d].
        """
        end = first + query.shape[1]
        start = max(first - self.window + 1, 0) if self.window else 0
        if first < prefix:
            start = 0
            end = max(end, prefix)
        sight = Sight(first - start, self.window, self.scale, self.softcap, max(prefix - start, 0))
        return checkpoint(
            attend_to_block,
            query,
            key[:, start:end],
            value[:, start:end],
            self._sinks(),
            sight,
            use_reentrant=False,
            preserve_rng_state=False,
        )

    def _sinks(self) -> Tensor | None:
        """Return what the softmax of each head has beside the products [H]; none: nothing."""
        return None


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


@dataclass(frozen=True)
class Sight:
    """What consecutive queries see of the keys before, among and behind them.

    Args:
        first: place among the keys of the key of the first query.
        window: tokens that a query sees, the own one counted; 0: all before it.
        scale: factor of the products.
        softcap: bound of the products after that; 0: none.
        prefix: so many of the first keys see each other.
    """

    first: int
    window: int
    scale: float
    softcap: float = 0.0
    prefix: int = 0

    def hides(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Tell which keys queries do not see: bool [queries, keys]."""
        places = torch.arange(queries, device=device)[:, None] + self.first
        others = torch.arange(keys, device=device)
        hidden = is_hidden(places - others, self.window)
        if self.prefix:
            hidden &= (places >= self.prefix) | (others >= self.prefix)
        return hidden


def capped(products: Tensor, softcap: float) -> Tensor:
    """Bound numbers softly, to between -softcap and softcap; 0: leave them."""
    return torch.tanh(products / softcap) * softcap if softcap else products


def attend_to_block(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sight: Sight
) -> Tensor:
    """Attend with consecutive queries to keys and, if there are any, to sinks.

    Args:
        query: [H, Q, d]
        key, value: [G, K, d]
        sinks: [H]
        sight: which keys they see, and how.

    Returns:
        [H, Q, d]
    """
    heads, queries, _ = query.shape
    groups, keys, size = value.shape
    scores = torch.matmul(query.reshape(groups, -1, size), key.transpose(1, 2))
    hidden = sight.hides(queries, keys, query.device)
    scores = capped(scores.view(heads, queries, keys).float() * sight.scale, sight.softcap)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        beside = sinks.float()[:, None, None].expand(heads, queries, 1)
        scores = torch.cat([scores, beside], dim=-1)
    shares = scores.softmax(-1)[..., :keys].to(value.dtype)
    return torch.matmul(shares.reshape(groups, -1, keys), value).view(heads, queries, size)
