"""LayerNorm and RMSNorm on torch's own kernels, fit for sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm


class Norm(nn.Module):
    """The norm that ``config.normalization`` names.

    megatron-core's wrapper of torch's norms refuses sequence parallelism. Here the parameters carry the mark by which megatron-core sums
    their gradients over the ranks that share the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        if self.bias is None:
            return rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)
