"""What layers that are recomputed, or shared among ranks, need to get gradients at all."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def ask_for_gradient(
    hidden: Tensor, config: TransformerConfig, *, helps_others: bool = False
) -> Tensor:
    """Make an input that nothing trained depends on ask for a gradient, where the layers that take
    it, or pieces of them, are recomputed, or other ranks train experts that these layers send
    tokens to.

    What is recomputed is one autograd function, which is left out of the backward pass if its input
    asks for no gradient, even when its weights do: behind frozen layers they would silently not be
    trained. And ranks that share experts exchange gradients of tokens: one that trains none of
    them has to take part.

    Args:
        hidden: the input.
        config: of the layers.
        helps_others: whether any rank trains an expert of these layers.
    """
    is_needed = config.recompute_granularity is not None or helps_others
    if not is_needed or hidden.requires_grad or not torch.is_grad_enabled():
        return hidden
    return hidden.detach().requires_grad_()
