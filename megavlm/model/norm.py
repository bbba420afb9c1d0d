"""LayerNorm and RMSNorm on torch's own kernels, fit for sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import layer_norm, rms_norm


class Norm(nn.Module):
    """The norm that ``config.normalization`` names.

    megatron-core's wrapper of torch's norms refuses sequence parallelism, and weights that 1 is
    added to. Here the parameters carry the mark by which megatron-core sums their gradients over
    the ranks that share the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            if config.normalization == "LayerNorm"
            else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        if self.bias is not None:
            return layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)
        return scaled_rms_norm(hidden, self.weight, self.eps, self.is_zero_centered)


def scaled_rms_norm(hidden: Tensor, weight: Tensor, eps: float, is_zero_centered: bool) -> Tensor:
    """RMSNorm over the last dimension, times the weight, or times one more than the weight."""
    if not is_zero_centered:
        return rms_norm(hidden, weight.shape, weight, eps)
    # In float32, as Transformer Engine and transformers: 1 would swallow a small weight.
    factor = 1 + weight.float()
    return rms_norm(hidden.float(), factor.shape, factor, eps).to(hidden.dtype)


class QueryKeyNorm(MegatronModule):
    """RMSNorm of queries and of keys over all heads at once, which tensor-parallel ranks share;
    InternViT-6B has it.

    Heads that only pad are zero, and so add nothing to the mean square.

    Args:
        config: megatron-core's configuration.
        width: of all heads together, without those that only pad.
        local_width: of the heads of this rank.
        group: ranks that share the heads.
    """

    def __init__(
        self, config: TransformerConfig, width: int, local_width: int, group: ProcessGroup
    ):
        super().__init__(config)
        self.width = width
        self.eps = config.layernorm_epsilon
        self.group = group
        self.query = nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))
        self.key = nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both [tokens of a tile, I, heads of this rank, head size]."""
        squares = torch.stack([states.float().square().sum((-2, -1)) for states in (query, key)])
        # Every rank's share of the loss depends on the sums: their gradients are summed too.
        means = (
            copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, self.group), self.group
            )
            / self.width
        )
        factors = torch.rsqrt(means + self.eps)[..., None, None]
        return _scaled(query, factors[0], self.query), _scaled(key, factors[1], self.key)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """Describe both weights as sharded over the tensor-parallel ranks, as the heads are;
        megatron-core calls this when it saves or loads a checkpoint.
        """
        weights = self.state_dict(prefix="", keep_vars=True)
        copies = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        axes = {"query": 0, "key": 0}
        return make_sharded_tensors_for_checkpoint(
            weights, prefix, axes, sharded_offsets, tp_group=self.group, dp_cp_group=copies
        )


def _scaled(states: Tensor, factors: Tensor, weight: Tensor) -> Tensor:
    """States times a factor for each token, in float32, times the norm's weight."""
    return (states.float() * factors).to(states.dtype) * weight.view(states.shape[-2:])
