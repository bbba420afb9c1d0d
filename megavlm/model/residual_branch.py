"""Adding a residual branch of a layer of the vision encoder, with its bias, layer scale and drop
path.

Shapes: hidden and branch [N, I, D] for N tokens of I tiles; bias and scale [D]; keep [I].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def add_branch(
    hidden: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Return ``hidden + (branch + bias) * scale * keep``.

    Args:
        hidden: what the branch began with.
        branch: what it ended in.
        bias: of its last linear layer.
        scale: the layer scale; none: the layer has none.
        keep: 0 for tiles whose branch is dropped, else the inverse of the probability of keeping
            it; none: all are kept.
    """
    added = branch + bias
    if scale is not None:
        added = added * scale
    return hidden + (added if keep is None else added * keep[:, None].to(branch.dtype))


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        branch: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        from megavlm.model.triton_kernels import branch_kernels

        branch = branch.contiguous()
        trains_scale = ctx.needs_input_grad[3]
        ctx.save_for_backward(branch if trains_scale else None, bias, scale, keep)
        return branch_kernels.add(hidden.contiguous(), branch, bias, scale, keep)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        from megavlm.model.triton_kernels import branch_kernels

        grad = grad.contiguous()
        found = branch_kernels.add_backward(grad, *ctx.saved_tensors)
        return grad, *found, None


def add_branch_by_kernels(
    hidden: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Return what ``add_branch`` does, by one kernel in each direction, on a GPU."""
    return _AddBranch.apply(hidden, branch, bias, scale, keep)
