"""The column-parallel linear layer of megatron-core, which also trains its bias beside a frozen
weight.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """A linear layer, its output split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the bias if it is left to the caller.

        megatron-core's product with a frozen weight (``LinearWithFrozenWeight``) adds the bias and
        gives it no gradient.
        """
        if self.skip_bias_add or self.bias is None or self.weight.requires_grad:
            return super().forward(input_, *args, **kwargs)
        self.skip_bias_add = True
        output, bias = super().forward(input_, *args, **kwargs)
        self.skip_bias_add = False
        return output + bias, None
