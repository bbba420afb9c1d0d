"""Attention that keeps keys and values while questions are answered, in front of any other kind.

In a decode pass each question has one new token, so that plain operations of torch are enough, and
all kinds of attention are alike but for windows, soft caps and sinks.

Shape letters: T tokens of a pack on this rank, R rows of a decode pass, Q questions of a group, H
query heads, G key and value heads, W slots, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavlm.model.attention import PackedSamples
from megavlm.model.block_attention import capped
from megavlm.model.key_value_cache import CachedKeys, Decode
from megavlm.model.named_after import named_after
from megavlm.model.windows import is_hidden, window_of


def caching(attention: type, *, has_sinks: bool = False, softcap: float = 0.0) -> type:
    """Let ``attention``, that of whole packs, keep keys and values in the pass over questions, and
    stand in for it in the passes behind.

    Args:
        attention: a class for the slot that megatron-core calls core attention.
        has_sinks: whether its ``softmax_offset`` are sinks.
        softcap: of its products, which it takes as an argument; 0: it has none.
    """
    settings = {"softcap": softcap} if softcap else {}

    @named_after(attention)
    class Caching(attention):
        def __init__(
            self,
            *args: Any,
            config: TransformerConfig,
            layer_number: int,
            pg_collection: ProcessGroupCollection,
            softmax_scale: float | None = None,
            **kwargs: Any,
        ):
            super().__init__(
                *args,
                config=config,
                layer_number=layer_number,
                pg_collection=pg_collection,
                softmax_scale=softmax_scale,
                **settings,
                **kwargs,
            )
            self.context_ranks = pg_collection.cp
            self.product_scale = softmax_scale
            self.seen_tokens = window_of(config, layer_number)

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: PackedSamples,
            **kwargs: Any,
        ) -> Tensor:
            """Attend; ``Attention.forward`` of megatron-core calls this."""
            cached = packed_seq_params.cached
            if isinstance(cached, Decode):
                keys = cached.extend(self, key, value)
                sinks = self.softmax_offset if has_sinks else None
                return attend_to_cached(
                    query, keys, self.product_scale, self.seen_tokens, sinks, softcap
                )
            if cached is not None:
                cached.record(self, key, value, self.context_ranks)
            return super().forward(
                query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs
            )

    return Caching


def attend_to_cached(
    query: Tensor,
    cached: Iterable[CachedKeys],
    scale: float | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend with the newest token of each question: [R, H, d] -> [R, H * d], zeros in rows that
    read nothing.

    Args:
        query: of all rows.
        cached: keys and values that they read.
        scale: factor of the products; none: 1 / sqrt(d).
        window: tokens that a query sees, the own one counted; 0: all.
        sinks: [H], see ``model/sink_attention``; none: there are none.
        softcap: bound of the products after that; 0: none.
    """
    scale = query.shape[2] ** -0.5 if scale is None else scale
    found = torch.zeros_like(query).flatten(1)
    for one in cached:
        questions, groups, width, size = one.values.shape
        queries = query[one.rows].view(questions, groups, -1, size)
        products = torch.matmul(queries, one.keys.transpose(2, 3)).float()
        scores = capped(products * scale, softcap)
        distance = one.slots[:, None] - torch.arange(width, device=query.device)
        hidden = is_hidden(distance, window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        if sinks is not None:
            beside = sinks.float().view(1, groups, -1, 1).expand(questions, -1, -1, 1)
            scores = torch.cat([scores, beside], dim=-1)
        probabilities = scores.softmax(-1)[..., :width].to(one.values.dtype)
        found[one.rows] = torch.matmul(probabilities, one.values).flatten(1)
    return found
