"""Torch operations in place of Transformer Engine's fused attention, and of the functions by which
its context parallelism cuts samples in halves and joins what ranks found of them.

A context-parallel rank holds two of 2 * ranks equal parts of each sample, one behind the other. In
each of its steps it attends to the keys of one rank, or to their first half, or with its second
half alone; the logarithms of the sums of exponentials then weigh the steps.

Shape letters: T tokens, S tokens of a tile, I tiles, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Of a query, a key, and a value: rows of each in one sample.
_Place = tuple[slice, slice]


def attention(*given: Any, **more: Any) -> list[Tensor]:
    """Attend inside tiles [S, I, H, D] or samples [T, H, D], as ``tex.fused_attn_fwd``.

    Returns:
        Output, logarithms of sums [I, H, S, 1] or [T, H, 1], and a state of random numbers.
    """
    (most, most_keys, _, scale) = given[:4]
    mask = _mask(given)
    first = _index_of(Tensor, given)
    (ends, key_ends, query, key, value, _, *starts) = given[first : first + 8]
    starts = [ends if one is None else one for one in starts]
    if query.dim() == 4:
        scores = _scores(*(_of_tiles(x) for x in (query, key)), scale, mask)
        sums = scores.logsumexp(-1, keepdim=True)
        out = (scores - sums).exp() @ _of_tiles(value)
        return [_from_tiles(out), sums, torch.zeros(2, dtype=torch.int64)]
    out = torch.zeros_like(query)
    sums = torch.zeros(*query.shape[:2], 1)
    for rows, keys in _places(ends, key_ends, *starts, most, most_keys):
        (q, k, v) = (_heads(x, query) for x in (query[rows], key[keys], value[keys]))
        scores = _scores(q, k, scale, mask)
        sum_ = scores.logsumexp(-1, keepdim=True)
        out[rows] = ((scores - sum_).exp() @ v).transpose(0, 1)
        sums[rows] = sum_.transpose(0, 1)
    return [out, sums, torch.zeros(2, dtype=torch.int64)]


def attention_backward(*given: Any, **more: Any) -> list[Tensor | None]:
    """Return the gradients of query, key and value, as ``tex.fused_attn_bwd``; the sums may be of
    more keys than there are, and so may the output.
    """
    (most, most_keys, scale) = given[:3]
    mask = _mask(given)
    first = _index_of(Tensor, given)
    (ends, key_ends, query, key, value, out, grad) = given[first : first + 7]
    kept = _index_of(list, given)
    (sums, *_) = given[kept]
    starts = [ends if one is None else one for one in given[kept + 1 : kept + 3]]
    if query.dim() == 4:
        inside = (_of_tiles(x) for x in (query, key, value, out, grad.view_as(out)))
        found = _backward(*inside, sums, scale, mask)
        return [*map(_from_tiles, found), None, None]
    made = [torch.zeros_like(x) for x in (query, key, value)]
    for rows, keys in _places(ends, key_ends, *starts, most, most_keys):
        parts = (query[rows], key[keys], value[keys], out[rows], grad.view_as(out)[rows])
        (q, k, v, o, g) = (_heads(x, query) for x in parts)
        found = _backward(q, k, v, o, g, sums[rows].transpose(0, 1), scale, mask)
        for target, place, one in zip(made, (rows, keys, keys), found, strict=True):
            # Several heads of the queries may read one of the keys.
            grouped = one.unflatten(0, (target.shape[1], -1)).sum(1)
            target[place] = grouped.transpose(0, 1)
    return [*made, None, None]


def _index_of(kind: type, given: tuple) -> int:
    """Return where the first argument of a kind is: releases have others in front."""
    return next(index for index, one in enumerate(given) if isinstance(one, kind))


def _mask(given: tuple) -> Any:
    """Return the argument that says what attention hides."""
    return next(one for one in given if type(one).__name__ == "NVTE_Mask_Type")


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    sums: Tensor,
    scale: float,
    mask: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values [..., H, T, D] of one sample."""
    weights = (_scores(q, k, scale, mask) - sums).exp()
    inner = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    inner = inner.to(q.dtype)
    weights = weights.to(q.dtype)
    return inner @ k, inner.mT @ q, weights.mT @ grad


def _scores(q: Tensor, k: Tensor, scale: float, mask: Any) -> Tensor:
    """Multiply queries [..., H, T, D] and keys of one sample, without what the mask hides."""
    scores = q @ k.mT * scale
    if "CAUSAL" not in mask.name:
        return scores
    (rows, columns) = scores.shape[-2:]
    behind = columns - rows if "BOTTOM_RIGHT" in mask.name else 0
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + behind)
    return scores.masked_fill(hidden, -torch.inf)


def _heads(x: Tensor, query: Tensor) -> Tensor:
    """Put heads [T, H, D] in front, each as often as the queries' heads read it."""
    return x.transpose(0, 1).repeat_interleave(query.shape[1] // x.shape[1], 0)


def _of_tiles(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def _from_tiles(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).contiguous()


def _places(
    ends: Tensor, key_ends: Tensor, starts: Tensor, key_starts: Tensor, most: int, most_keys: int
) -> Iterator[_Place]:
    """Yield the rows of each sample and of its keys.

    Args:
        ends, key_ends: of samples, without padding [N + 1].
        starts, key_starts: where samples begin, with padding [N + 1].
        most, most_keys: longest sample, which a kernel is told.

    Raises:
        RuntimeError: a sample is longer.
    """
    counts = [one.diff().tolist() for one in (ends, key_ends)]
    for limit, lengths in zip((most, most_keys), counts, strict=True):
        if max(lengths) > limit:
            raise RuntimeError(f"a sample of {max(lengths)} tokens, above {limit}")
    firsts = [one[:-1].tolist() for one in (starts, key_starts)]
    for first, key_first, count, key_count in zip(*firsts, *counts, strict=True):
        if count:
            yield slice(first, first + count), slice(key_first, key_first + key_count)


def _half(starts: Tensor, half: int) -> Tensor:
    """Return the rows of the first or second half of each sample of a rank."""
    middles = (starts[:-1] + starts[1:]) // 2
    (first, end) = (starts[:-1], middles) if half == 0 else (middles, starts[1:])
    return torch.cat([torch.arange(*pair) for pair in zip(first, end, strict=True)])


def read_half(x: Tensor, starts: Tensor, half: int) -> Tensor:
    """Take one half of each sample's rows [T, H, D], as ``tex.thd_read_half_tensor``."""
    return x[_half(starts, half)]


def read_second_half_sums(sums: Tensor, starts: Tensor, is_packed: bool, length: int) -> Tensor:
    """Take the second half of each sample's sums [H, T], as ``tex.thd_read_second_half_lse``."""
    return sums[:, _half(starts, 1)]


def add_second_half_sums(sums: Tensor, step: Tensor, starts: Tensor, is_packed: bool) -> None:
    """Add a step's sums [H, T / 2], as ``tex.thd_second_half_lse_correction``."""
    rows = _half(starts, 1)
    sums[:, rows] = torch.logaddexp(sums[:, rows], step)


def add_output(
    out: Tensor,
    step: Tensor,
    sums: Tensor,
    step_sums: Tensor,
    starts: Tensor,
    only_second_half: bool,
    is_packed: bool,
) -> None:
    """Add a step's output [T, H, D] by its weight, as ``tex.thd_out_correction``."""
    rows = _half(starts, 1) if only_second_half else torch.arange(len(out))
    weight = (step_sums - sums[:, rows]).exp().T[..., None]
    out[rows] += (step.view(len(rows), *out.shape[1:]) * weight).to(out.dtype)


def add_gradient(grad: Tensor, step: Tensor, starts: Tensor, first: str, second: str) -> None:
    """Add a step's gradient to each half, copy it, or leave it: ``tex.thd_grad_correction``."""
    has_both = "none" not in (first, second)
    for half, action in enumerate((first, second)):
        rows = _half(starts, half)
        if action != "none":
            part = step[rows] if has_both else step
            grad[rows] = part + grad[rows] if action == "add" else part


class _Once:
    """A request that may be waited for again, as those of NCCL; gloo would wait for ever."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self) -> None:
        """Wait if nobody has."""
        if self._request is not None:
            self._request.wait()
        self._request = None


def install_requests() -> None:
    """Let context parallelism wait for its requests more than once, as it does."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *given: list(
        map(_Once, communicate(*given))
    )


COMPILED = {
    "fused_attn_fwd": attention,
    "fused_attn_bwd": attention_backward,
    "thd_read_half_tensor": read_half,
    "thd_read_second_half_lse": read_second_half_sums,
    "thd_second_half_lse_correction": add_second_half_sums,
    "thd_out_correction": add_output,
    "thd_grad_correction": add_gradient,
}
