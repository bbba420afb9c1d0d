"""The gate of a SwiGLU MLP by Transformer Engine's kernels. What torch compiles of it writes the
gradient of both halves by one kernel with a slow branch, at half of the memory's rate.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, halves: Tensor) -> Tensor:
        import transformer_engine_torch as tex

        ctx.save_for_backward(halves)
        return tex.swiglu(halves, None)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        import transformer_engine_torch as tex

        return tex.dswiglu(grad.contiguous(), *ctx.saved_tensors, None)


class Swiglu:
    """``silu(first half) * second half`` (Shazeer, arXiv 2002.05202): [T, 1, 2F] -> [T, 1, F].
    megatron-core's ``MLP`` builds it and calls it behind its first linear layer; it is no
    ``torch.nn.Module``, since it has nothing to be saved.

    Args:
        config: of the part; nothing of it is used.
    """

    def __init__(self, config: TransformerConfig):
        pass

    def __call__(self, halves: Tensor) -> Tensor:
        return _Swiglu.apply(halves)
