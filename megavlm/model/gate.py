"""Gates of MLPs by Transformer Engine's kernels. What torch compiles of SwiGLU writes the gradient
of both halves by one kernel with a slow branch, at half of the memory's rate; and megatron-core's
function of the clamped gate clamps beside what it compiles, and sends a number to the device.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, halves: Tensor, limit: float | None
    ) -> Tensor:
        import transformer_engine_torch as tex

        ctx.save_for_backward(halves)
        ctx.limit = limit
        if limit is None:
            return tex.swiglu(halves, None)
        return tex.clamped_swiglu(halves, None, limit)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        import transformer_engine_torch as tex

        given = (grad.contiguous(), *ctx.saved_tensors, None)
        if ctx.limit is None:
            return tex.dswiglu(*given), None
        return tex.clamped_dswiglu(*given, ctx.limit), None


class Gate(MegatronModule):
    """``silu(first half) * second half`` (SwiGLU, Shazeer, arXiv 2002.05202): [T, 1, 2F] -> [T, 1,
    F]; or, with a limit L, ``quick_gelu(min(first, L)) * (clamp(second, -L, L) + 1)``, as in
    GPT-OSS.

    megatron-core's ``MLP`` and experts build it. It has nothing to be saved, but 0.19 of it takes
    nothing but a module, and 0.16 asks each module what it saves.

    Args:
        config: of the part, of which ``activation_func_clamp_value`` is the limit.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self._limit = config.activation_func_clamp_value

    def forward(self, halves: Tensor) -> Tensor:
        """Gate one half by the other; ``MLP`` and experts call this behind their first linear
        layer.
        """
        if not len(halves):  # No token of the batch goes to an expert of this rank.
            # Transformer Engine before 2.11, and 2.11 on Blackwell, fails without rows.
            return halves[..., : halves.shape[-1] // 2]
        return _Gate.apply(halves, self._limit)
