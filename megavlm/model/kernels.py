"""Which classes and functions the layers are made of: Transformer Engine's where CUDA and the
package are there, else megatron-core's own.

Both give a checkpoint the same keys: Transformer Engine folds a norm into the linear layer after
it, and the key maps of ``model/specs`` let the separate norms be saved under the same names.

Shape letters: T tokens of the pack, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor
from torch.distributed import ProcessGroup

from megavlm.config.schema import Config
from megavlm.model.attention import PackedAttention, TileAttention
from megavlm.model.column_linear import ColumnLinear
from megavlm.model.experts import ExpertRowLinear, grouped_experts, sequential_experts
from megavlm.model.gate import Gate
from megavlm.model.norm import Norm
from megavlm.model.precision import uses_transformer_engine
from megavlm.model.residual_branch import add_branch, add_branch_by_kernels
from megavlm.model.token_sorting import sort_by_kernels
from megavlm.model.transformer_engine import (
    accumulating,
    compiled,
    of_packs,
    split_without_copies,
    without_draws,
)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The classes that fill the slots of a layer, and the functions between them.

    Args:
        norm: norm that stands alone (before the connector, after the last layer).
        layer_norm: norm in front of attention and MLP; nothing where the linear layer after it
            normalises.
        norm_linear: linear layer after that norm, its output split over the tensor-parallel ranks.
        column_linear: the same linear layer without a norm.
        row_linear: linear layer with its input split, its output summed.
        tile_attention: attention inside the tiles.
        packed_attention: attention, causal or not, inside the samples of a pack.
        experts: the experts of a layer that this rank holds.
        gate: SwiGLU and the clamped gate of an MLP or of experts; none: megatron-core's.
        is_fused: whether fused kernels turn queries and keys, gate the MLP, add residuals with
            biases, sort tokens by expert, and multiply those of all experts.
        pointwise: makes one kernel of a function that works element by element.
        add_branch: adds a residual branch of the vision encoder.
        checkpoint: calls a function on tensors, of which it keeps the inputs only, and calls it
            again in the backward pass; a group of tensor-parallel ranks stands between the two.
        cross_entropy: losses of the tokens [T, 1] from a rank's share of the logits [T, 1, V /
            tensor-parallel ranks], which it may overwrite, and the labels [T, 1].
    """

    norm: type
    layer_norm: type
    norm_linear: type
    column_linear: type
    row_linear: type
    tile_attention: type
    packed_attention: type
    experts: type
    gate: type | None
    is_fused: bool
    pointwise: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    add_branch: Callable[..., Tensor]
    checkpoint: Callable
    cross_entropy: Callable[[Tensor, Tensor, ProcessGroup], Tensor]


def local_kernels() -> Kernels:
    """Layers that run anywhere."""
    return Kernels(
        norm=Norm,
        layer_norm=Norm,
        norm_linear=ColumnLinear,
        column_linear=ColumnLinear,
        row_linear=RowParallelLinear,
        tile_attention=TileAttention,
        packed_attention=PackedAttention,
        experts=sequential_experts(
            MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=ExpertRowLinear)
        ),
        gate=None,
        is_fused=False,
        pointwise=lambda function: function,
        add_branch=add_branch,
        checkpoint=lambda function, group, *tensors: tensor_parallel.checkpoint(
            function, False, *tensors
        ),
        cross_entropy=lambda logits, labels, group: tensor_parallel.vocab_parallel_cross_entropy(
            logits, labels
        ),
    )


def transformer_engine_kernels() -> Kernels:
    """Return Transformer Engine's layers, which need a CUDA device to run."""
    from megatron.core.extensions import transformer_engine as engine
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    split_without_copies()
    sort_by_kernels()

    def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        # What must be fit for CUDA graphs does not look at the gradient's value, which would make
        # the host wait for the device.
        return engine.te_parallel_cross_entropy(logits, labels, group, True)

    def checkpoint(function: Callable, group: ProcessGroup, *tensors: Tensor):
        # Transformer Engine's own also keeps the scales of FP8 from changing when the function is
        # called again.
        return engine.te_checkpoint(function, False, get_cuda_rng_tracker, group, *tensors)

    return Kernels(
        norm=engine.TENorm,
        layer_norm=IdentityOp,
        norm_linear=accumulating(engine.TELayerNormColumnParallelLinear),
        column_linear=accumulating(engine.TEColumnParallelLinear),
        row_linear=accumulating(engine.TERowParallelLinear),
        tile_attention=without_draws(engine.TEDotProductAttention),
        packed_attention=of_packs(without_draws(engine.TEDotProductAttention)),
        experts=grouped_experts(
            TEGroupedMLP,
            MLPSubmodules(
                linear_fc1=accumulating(engine.TEColumnParallelGroupedLinear),
                linear_fc2=accumulating(engine.TERowParallelGroupedLinear),
                activation_func=Gate,  # built if ``use_te_activation_func``
            ),
        ),
        gate=Gate,
        is_fused=True,
        pointwise=compiled,
        add_branch=add_branch_by_kernels,
        checkpoint=checkpoint,
        cross_entropy=cross_entropy,
    )


def choose_kernels(config: Config) -> Kernels:
    """Return the layers that the configuration asks for, or the best that this device runs."""
    if not uses_transformer_engine(config):
        return local_kernels()
    kernels = transformer_engine_kernels()
    lora = config.architecture.lora
    if lora.nf4:
        # Transformer Engine's linear layers save weights for the backward pass in their own ways.
        kernels = replace(kernels, column_linear=ColumnLinear, row_linear=RowParallelLinear)
    if lora.rank:
        # An adapter reads what the norm gives, which a linear layer that normalises does not show.
        kernels = replace(kernels, layer_norm=kernels.norm, norm_linear=kernels.column_linear)
    return kernels
