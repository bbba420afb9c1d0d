"""Float32 tensors that take the gradients of 16-bit parameters, to sum them without rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _ReadFor(torch.autograd.Function):
    """Read a parameter; the gradient goes to its stand-in, in float32."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def read_for(stand_in: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter; their gradient goes to the stand-in."""
    return _ReadFor.apply(stand_in, parameter)


def stand_in_for(parameter: Tensor) -> Tensor:
    """Return a float32 leaf of a parameter's shape, which needs no memory."""
    one = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return one.expand(parameter.shape).requires_grad_()
