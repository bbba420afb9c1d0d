"""Attention between queries and keys where Transformer Engine is not there, on torch's own kernels.

megatron-core's own attention without Transformer Engine refuses packed samples; these two stand in
its place in the layer specs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megavlm.data.loading.batch import Batch, Media, Prefixes
from megavlm.model.key_value_cache import Decode, Prefill
from megavlm.parallel.context_parallel import ends_of, gather_tokens, own_positions


@dataclass
class PackedSamples(PackedSeqParams):
    """Where samples end in a pack, for attention and rotary embedding.

    Args:
        query_lengths, key_lengths: tokens between the ends of both kinds, for our own attention: to
            ask the device for them makes the host wait, in each layer.
        pad_between_seqs: whether padding stands between samples. Transformer Engine compares both
            kinds of ends on the device and waits for the answer, unless it is told.
        prefixes: where samples are divided, for a prefix-LM; none: attention is causal, or without
            a mask, in whole samples.
        media: which tokens read which image, for cross-attention; none: the model has none.
        cached: what is kept of keys and values, or read, while questions are answered.
    """

    query_lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()
    pad_between_seqs: bool = False
    prefixes: Prefixes | None = None
    media: Media | None = None
    cached: Prefill | Decode | None = None

    @classmethod
    def inside(
        cls, ends: Tensor, lengths: tuple[int, ...], longest: int | None = None, **others: Any
    ) -> Self:
        """Describe attention of tokens to those of the same span.

        Args:
            ends: int32 [N + 1], where the spans start and end.
            lengths: of each span.
            longest: of the spans; none: that of ``lengths``.
            others: further fields.
        """
        most = max(lengths) if longest is None else longest
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=most,
            max_seqlen_kv=most,
            query_lengths=lengths,
            key_lengths=lengths,
            **others,
        )

    @classmethod
    def of(cls, batch: Batch, *, has_prefixes: bool, context_ranks: int) -> PackedSamples:
        """Describe the samples of a pack.

        Args:
            batch: the pack.
            has_prefixes: whether the model is a prefix-LM.
            context_ranks: ranks that share the pack.
        """
        ends = batch.sample_ends
        # Transformer Engine cuts samples at the ends with padding. There is none between ours: what
        # aligns a sample is part of it.
        padded = ends if context_ranks > 1 else None
        return cls.inside(
            ends,
            batch.sample_lengths,
            batch.longest_sample,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            prefixes=batch.prefixes if has_prefixes else None,
            media=batch.media,
            cached=batch.cached,
        )

    def of_prefixes(self) -> PackedSamples:
        """Describe attention inside prefixes."""
        return PackedSamples.inside(self.prefixes.ends, self.prefixes.lengths)

    def of_rest(self) -> PackedSamples:
        """Describe attention of the other tokens to their whole samples."""
        both = zip(self.query_lengths, self.prefixes.lengths, strict=True)
        lengths = tuple(whole - prefix for whole, prefix in both)
        return PackedSamples(
            qkv_format=self.qkv_format,
            cu_seqlens_q=self.cu_seqlens_q - self.prefixes.ends,
            cu_seqlens_kv=self.cu_seqlens_kv,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=self.max_seqlen_kv,
            query_lengths=lengths,
            key_lengths=self.key_lengths,
        )


Attend = Callable[[Tensor, Tensor, Tensor, PackedSamples, bool], Tensor]
"""Attends sample by sample, from queries, keys, values and the ends of both in each sample. If the
last argument is true, the mask is causal, and the last query of a sample sees all of its keys;
else there is no mask.
"""


def attend_with_prefixes(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples
) -> Tensor:
    """Attend as a prefix-LM: one call for the prefixes, and one for the rest, whose keys are those
    of the whole samples. No kernel for packed samples has such a mask.

    Shapes: query [T, H, head size], key and value [T, key and value heads, head size] -> [T, H *
    head size].
    """
    inside = samples.prefixes.inside
    outside = samples.prefixes.outside
    queries, keys, values = (x.index_select(0, inside) for x in (query, key, value))
    of_prefixes = attend(queries, keys, values, samples.of_prefixes(), False)
    rest = query.index_select(0, outside)
    of_rest = attend(rest, key, value, samples.of_rest(), True)
    found = torch.cat([of_prefixes, of_rest])
    return torch.empty_like(found).index_copy(0, torch.cat([inside, outside]), found)


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
    a causal mask, everything, or, in a prefix, the prefix; never another sample of the pack.

    Where ranks share the pack, each brings together the keys and values of all tokens, and attends
    with its own queries.

    Shapes: query [T, H, head size], key and value [T, key and value heads, head size] -> [T, H *
    head size]; T tokens of this rank.

    Args:
        attn_mask_type: causal, or no mask, for which samples must belong to one rank as a whole.
        pg_collection: process groups; without them the pack belongs to this rank alone.
        softmax_scale: factor of the products of queries and keys; none: 1 / sqrt(head size).
    """

    def __init__(
        self,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        softmax_scale: float | None = None,
        **kwargs,
    ):
        super().__init__()
        self.is_causal = attn_mask_type is AttnMaskType.causal
        self.scale = softmax_scale
        has_ranks = pg_collection is not None and pg_collection.cp.size() > 1
        self.group = pg_collection.cp if has_ranks and self.is_causal else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSamples,
        **kwargs,
    ) -> Tensor:
        """Attend sample by sample; ``Attention.forward`` of megatron-core calls this."""
        if self.group is not None:
            grouped = query.shape[1] != key.shape[1]
            lengths = packed_seq_params.query_lengths
            return self._attend_to_all(query, key, value, lengths, grouped)
        if packed_seq_params.prefixes is not None:
            attend = partial(_attend, scale=self.scale)
            return attend_with_prefixes(attend, query, key, value, packed_seq_params)
        return _attend(query, key, value, packed_seq_params, self.is_causal, scale=self.scale)

    def _attend_to_all(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], grouped: bool
    ) -> Tensor:
        ends = ends_of(lengths)
        positions = own_positions(ends, self.group).to(query.device, non_blocking=True)
        key, value = gather_tokens(torch.cat([key, value], dim=-1), ends, self.group).split(
            (key.shape[-1], value.shape[-1]), dim=-1
        )
        own = [length // self.group.size() for length in lengths]
        parts = (
            *(
                _heads_first(x).split(sizes, dim=2)
                for x, sizes in ((query, own), (key, lengths), (value, lengths))
            ),
            positions.split(own),
        )
        attended = []
        for q, k, v, position, start in zip(*parts, ends[:-1], strict=True):
            places = torch.arange(start, start + k.shape[2], device=position.device)
            seen = position[:, None] >= places
            attended.append(
                scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=seen,
                    scale=self.scale,
                    enable_gqa=grouped,
                )
            )
        return _tokens_first(attended)


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, head size] -> [1, H, T, head size]: torch has kernels that keep no matrix of all pairs
    of tokens, for four dimensions only.
    """
    return x.transpose(0, 1)[None]


def _tokens_first(attended: list[Tensor]) -> Tensor:
    """Put the samples, each [1, H, T of the sample, head size], together: [T, H * head size]."""
    return torch.cat(attended, dim=2)[0].transpose(0, 1).flatten(1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: PackedSamples,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> Tensor:
    """See ``Attend``; ``scale`` as ``softmax_scale`` of ``PackedAttention``."""
    if not is_causal:
        return _attend_without_mask(query, key, value, samples, scale)
    lengths = (samples.query_lengths, samples.key_lengths, samples.key_lengths)
    split = (
        _heads_first(x).split(sizes, dim=2)
        for x, sizes in zip((query, key, value), lengths, strict=True)
    )
    grouped = query.shape[1] != key.shape[1]
    attended = []
    for q, k, v in zip(*split, strict=True):
        missing = k.shape[2] - q.shape[2]
        # torch aligns its causal mask with the first key.
        mask = None
        if missing:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(missing)
        attended.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=not missing,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return _tokens_first(attended)


def _attend_without_mask(
    query: Tensor, key: Tensor, value: Tensor, samples: PackedSamples, scale: float | None
) -> Tensor:
    """Attend in one call to neighbours of equal length, such as the windows of an image; arguments
    as for ``_attend``.
    """
    grouped = query.shape[1] != key.shape[1]
    attended = []
    first_query = first_key = 0
    pairs = zip(samples.query_lengths, samples.key_lengths, strict=True)
    for (queries, keys), run in groupby(pairs):
        count = len(tuple(run))
        last_query = first_query + count * queries
        last_key = first_key + count * keys
        q = query[first_query:last_query].reshape(count, queries, *query.shape[1:])
        k, v = (
            states[first_key:last_key].reshape(count, keys, *states.shape[1:])
            for states in (key, value)
        )
        found = scaled_dot_product_attention(
            *(states.transpose(1, 2) for states in (q, k, v)), scale=scale, enable_gqa=grouped
        )
        attended.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        first_query = last_query
        first_key = last_key
    return torch.cat(attended)
