"""Tokens sorted by expert, and back, in Transformer Engine's kernels, where those are right.

megatron-core's own functions select tokens by a mask twice, after which the host waits for the
device, and add the outputs of a token's experts in 16 bits, in any order; the kernels know from the
dispatcher how many tokens there are, and add in float32, always in the same order.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


@functools.cache
def sort_by_kernels() -> None:
    """Let megatron-core's dispatchers call what is here, once in a process."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.permute = functools.partial(_permute, token_dispatcher.permute)
    token_dispatcher.unpermute = functools.partial(_unpermute, token_dispatcher.unpermute)


def _permute(
    plain: Any,
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | Tensor,
    fused: bool,
    **settings: Any,
) -> tuple[Tensor | None, ...]:
    """Sort tokens [T, D] by expert, a copy for each expert of a token.

    Transformer Engine 2.11 has no gradient of the weights of experts if the tokens need none, and
    fails if no token goes anywhere, as on a rank with nothing but padding: it returns no rows, and
    its backward pass ends in an error.

    Args:
        plain: ``permute`` of megatron-core.
        tokens: read from, [T, D].
        routing_map: whether a token goes to an expert, bool [T, E].
        probs: weights of experts [T, E].
        num_out_tokens: copies R, on the host.
        fused: whether the configuration asks for kernels.
        settings: further arguments.

    Returns:
        Copies [R, D], their weights [R], and what ``_unpermute`` needs; of megatron-core 0.19 two
        more, which are none here.
    """
    if probs is not None and probs.requires_grad and not tokens.requires_grad:
        tokens = tokens.detach().requires_grad_()
    count = int(num_out_tokens)
    return plain(
        tokens,
        routing_map,
        probs=probs,
        num_out_tokens=count,
        fused=fused and count > 0,
        **settings,
    )


def _unpermute(
    plain: Any, copies: Tensor, places: Tensor, *, fused: bool, **settings: Any
) -> Tensor:
    """Add the copies of each token [R, D] to [T, D]; what ``_permute`` sorted without kernels is
    added without.

    Args:
        plain: ``unpermute`` of megatron-core.
        copies: of the tokens, R of them.
        places: what ``_permute`` returned.
        fused: whether the configuration asks for kernels.
        settings: further arguments.
    """
    return plain(copies, places, fused=fused and len(copies) > 0, **settings)
