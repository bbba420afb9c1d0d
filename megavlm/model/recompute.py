"""What recomputed layers need to get gradients at all."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def ask_for_gradient(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """Make an input that nothing trained depends on ask for a gradient, where the layers that take
    it, or pieces of them, are recomputed.

    What is recomputed is one autograd function, which is left out of the backward pass if its input
    asks for no gradient, even when its weights do: behind frozen layers they would silently not be
    trained.
    """
    if config.recompute_granularity is None or hidden.requires_grad or not torch.is_grad_enabled():
        return hidden
    return hidden.detach().requires_grad_()
