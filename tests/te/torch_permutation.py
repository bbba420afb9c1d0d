"""Torch operations in place of the Triton kernels by which Transformer Engine sorts tokens by
expert; its autograd functions around them run as they are.

Shape letters: T tokens, D width, E experts, R copies of tokens, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def install() -> None:
    """Put the stand-ins in place."""
    import transformer_engine.pytorch.triton.permutation as kernels

    for function in (
        make_row_id_map,
        permute_with_mask_map,
        unpermute_with_mask_map,
        make_chunk_sort_map,
        sort_chunks_by_map,
    ):
        setattr(kernels, function.__name__, function)
    make_orders_on_cpu()


def make_orders_on_cpu() -> None:
    """Let megatron-core's dispatchers make the order of experts on the CPU."""
    from megatron.core.transformer.moe import token_dispatcher

    from megavlm.parallel import cpu_backend

    token_dispatcher.torch = cpu_backend.TorchOnCpu(["arange"])


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Return the copy of each token for each expert, -1 if there is none, in the first columns of
    [T, 2E + 1].
    """
    in_order = routing_map.T.reshape(-1).cumsum(0).sub(1).view(num_experts, num_tokens).T
    places = torch.full((num_tokens, 2 * num_experts + 1), -1)
    places[:, :num_experts] = torch.where(routing_map, in_order, -1)
    return places


def _copies(row_id_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, expert and place of each copy."""
    places = row_id_map[:, :num_experts]
    token, expert = (places >= 0).nonzero(as_tuple=True)
    return token, expert, places[token, expert]


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    *rest: int | None,
) -> tuple[Tensor, None, Tensor | None]:
    """Copy rows of ``inp`` [T, D] to [R, D], and weights [T, E] to [R]; releases from 2.12 on have
    another argument in front of the sizes, which is none here.
    """
    (_, num_experts, num_out_tokens, *_) = [one for one in rest if one is not None]
    (token, expert, place) = _copies(row_id_map, num_experts)
    copies = inp.new_full((num_out_tokens, inp.shape[1]), float("nan"))
    copies[place] = inp[token]
    if probs is None:
        return copies, None, None
    own = probs.new_full((num_out_tokens,), float("nan"))
    own[place] = probs[token, expert]
    return copies, None, own


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: None,
    permuted_probs: Tensor | None,
    *rest: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Add copies [R, D] up in float32, to [T, D], and put weights [R] back to [T, E]."""
    (num_tokens, num_experts, hidden_size) = [one for one in rest if one is not None]
    (token, expert, place) = _copies(row_id_map, num_experts)
    sums = torch.zeros(num_tokens, hidden_size).index_add_(0, token, inp[place].float())
    if permuted_probs is None:
        return sums.to(inp.dtype), None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[token, expert] = permuted_probs[place]
    return sums.to(inp.dtype), probs


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """Return where each row goes if chunks of sizes [C] are put in the order ``sorted_indices``."""
    rows = torch.arange(num_tokens).split(split_sizes.tolist())
    places = torch.empty(num_tokens, dtype=torch.int64)
    places[torch.cat([rows[chunk] for chunk in sorted_indices.tolist()])] = torch.arange(num_tokens)
    return places


def sort_chunks_by_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Put rows [R, D] and weights [R] where they go, or, backward, where they came from."""
    if is_forward:
        row_id_map = row_id_map.argsort()
    return inp[row_id_map], None if probs is None else probs[row_id_map]
