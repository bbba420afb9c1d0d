"""The column-parallel linear layer of megatron-core, which also trains its bias beside a frozen
weight.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """A linear layer, its output split over the tensor-parallel ranks.

    It adds its bias behind the product: megatron-core's product with a frozen weight
    (``LinearWithFrozenWeight``) adds a bias and gives it no gradient.
    """

    def __init__(self, *args: Any, skip_bias_add: bool = False, **kwargs: Any):
        super().__init__(*args, skip_bias_add=True, **kwargs)
        self.adds_bias = not skip_bias_add

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the bias if it is left to the caller."""
        output, bias = super().forward(input_, *args, **kwargs)
        if bias is None or not self.adds_bias:
            return output, bias
        return output + bias, None
