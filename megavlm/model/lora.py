"""LoRA and DoRA adapters on the linear layers of megatron-core and Transformer Engine.

Shape letters: T rows, R rank, n stacked A's, O outputs of this rank.

| linear layer | A | B | between |
|---|---|---|---|
| column-parallel | whole | rows of this rank | copied; sequence parallelism gathers tokens |
| row-parallel | columns of this rank | whole | summed; sequence parallelism scatters tokens |

So only R numbers a token travel, and both factors get the gradients of one process.

DoRA (arXiv 2402.09353) scales each output by ``magnitude / norm``, where the norm is that of its
row of ``W + scale * B A`` and has no gradient. Ranks share the rows of row-parallel layers and sum
the squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import linear, one_hot

from megavlm.config.lora import LINEARS, SMALLEST_NORM, stacked
from megavlm.config.schema import Architecture
from megavlm.model.lora_dropout import Location, adapter_salt, current_draw, drop

_COLUMN = ("linear_qkv.weight", "linear_fc1.weight")


class LowRankAdapter(nn.Module):
    """The two factors beside one linear layer.

    Args:
        key: checkpoint key of the layer's weight.
        weight: this rank's share of it [outputs, inputs].
        architecture: the model, with the settings.
        config: megatron-core's configuration of the part.
        group: tensor-parallel ranks that share the layer.
        tile_rank: which share of a pack's tiles this rank reads.
    """

    def __init__(
        self,
        key: str,
        weight: Tensor,
        architecture: Architecture,
        config: TransformerConfig,
        group: ProcessGroup,
        tile_rank: int = 0,
    ):
        super().__init__()
        lora = architecture.lora
        outputs, inputs = weight.shape
        self.count = stacked(architecture, key)
        self.scale = lora.scale
        self.dropout = lora.dropout
        self.salt = adapter_salt(key)
        self.tile_rank = tile_rank
        self.group = group
        self.is_column = key.endswith(_COLUMN)
        self.is_gated = config.gated_linear_unit and key.endswith("linear_fc1.weight")
        self.is_scattered = config.sequence_parallel
        options = dict(dtype=weight.dtype, device=weight.device)
        self.a = nn.Parameter(torch.zeros(self.count * lora.rank, inputs, **options))
        self.b = nn.Parameter(torch.zeros(outputs, lora.rank, **options))
        self.magnitude = nn.Parameter(torch.zeros(outputs, **options)) if lora.dora else None
        of_rows = [self.b] if self.magnitude is None else [self.b, self.magnitude]
        for cut in of_rows if self.is_column else [self.a]:
            axis = 0 if self.is_column else 1
            set_tensor_model_parallel_attributes(cut, group.size() > 1, axis, 1)
        if self.is_scattered:
            # Sees the tokens of this rank only: megatron-core's ``finalize_model_grads`` sums it.
            for whole in [self.a] if self.is_column else of_rows:
                whole.sequence_parallel = True
        # Which of the stacked A's each row of B belongs to [O, n].
        owners = torch.tensor(self._projections(config, outputs), device=weight.device)
        owners = one_hot(owners, self.count).to(weight.dtype) if self.count > 1 else None
        self.register_buffer("owners", owners, persistent=False)

    def _projections(self, config: TransformerConfig, outputs: int) -> list[int]:
        """Return which projection each row of this rank's weight belongs to."""
        if self.count == 3:  # for each query group its queries, a key, a value
            groups = config.num_query_groups or config.num_attention_heads
            queries = config.num_attention_heads // groups
            heads = [0 for _ in range(queries)] + [1, 2]
            one_group = [number for number in heads for _ in range(config.kv_channels)]
            rows = [number for _ in range(groups) for number in one_group]
            start = self.group.rank() * outputs
            return rows[start : start + outputs]
        return [row * self.count // outputs for row in range(outputs)]

    def forward(self, hidden: Tensor, projected: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added to it.

        Args:
            hidden: what the layer reads [T, ..., inputs of this rank].
            projected: what it makes of it [T, ..., O].
        """
        if self.dropout and self.training:
            hidden = drop(hidden, self.dropout, self.salt, self._location(hidden))
        low = linear(hidden, self.a)
        if not self.is_column:
            between = (
                reduce_scatter_to_sequence_parallel_region
                if self.is_scattered
                else reduce_from_tensor_model_parallel_region
            )
        else:
            between = (
                gather_from_sequence_parallel_region
                if self.is_scattered
                else copy_to_tensor_model_parallel_region
            )
        low = between(low, group=self.group)
        # One pass over the output, which is larger than everything else here.
        added = torch.addmm(
            projected.flatten(0, -2), low.flatten(0, -2), self._factor().T, alpha=self.scale
        )
        return added.view_as(projected)

    def _factor(self) -> Tensor:
        """Return B beside zeros: each row meets its own of the stacked A's alone [O, n R]."""
        if self.owners is None:
            return self.b
        return (self.owners.unsqueeze(2) * self.b.unsqueeze(1)).flatten(1)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Return the norm of each row of ``W + scale * B A`` [O], without making the matrix.
        Collective.

        Args:
            weight: W, this rank's share [O, inputs of this rank].
        """
        a = self.a.float()
        b = self._factor().float()
        products = linear(weight, self.a).float()
        cross = ((2 * products + self.scale * (b @ (a @ a.T))) * b).sum(-1)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        squares = own + self.scale * cross
        if not self.is_column and self.group.size() > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.clamp(min=SMALLEST_NORM**2).sqrt()

    def rescaled(self, weight: Tensor, output: Tensor) -> Tensor:
        """Give each row of the adapted weight its magnitude.

        Args:
            weight: see ``norms``.
            output: of the weight and the adapter, without bias [T, ..., O].
        """
        return output * (self.magnitude / self.norms(weight).to(output.dtype))

    def _location(self, hidden: Tensor) -> Location:
        """Return where this rank's input [T, ..., inputs] is in the whole one."""
        own = self.group.rank()
        has_rows = self.is_column and self.is_scattered
        return Location(
            draw=current_draw(),
            first_row=own * hidden.shape[0] if has_rows else 0,
            first_tile=self.tile_rank * hidden.shape[1],
            first_feature=0 if self.is_column else own * hidden.shape[2],
        )

    def sharded(self, entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return the checkpoint entries of what is cut over the tensor-parallel ranks.

        Args:
            entries: of the whole chunk, in which it looks like whole tensors.
            prefix: of this adapter's names in them.
        """
        axis = 0 if self.is_column else 1
        names = ("b", "magnitude") if self.is_column else ("a",)
        sharded = {}
        for name in (prefix + name for name in names if prefix + name in entries):
            found = entries[name]
            entry = ShardedTensor.from_rank_offsets(
                found.key,
                found.data,
                (axis, self.group.rank(), self.group.size()),
                replica_id=(found.replica_id[0], 0, found.replica_id[2]),
                allow_shape_mismatch=found.allow_shape_mismatch,
            )
            sharded[name] = apply_swiglu_sharded_factory(entry, ()) if self.is_gated else entry
        return sharded


def linears(part: nn.Module, stack: str) -> list[tuple[str, nn.Module]]:
    """Return the linear layers of a part's transformer layers, but for those of experts, with the
    checkpoint keys of their weights.

    Args:
        part: the vision encoder or the language model of a chunk.
        stack: checkpoint key that its layers' keys begin with.
    """
    return [
        (f"{stack}.{layer.layer_number - 1}.{name}.weight", layer.get_submodule(name))
        for layer in part.modules()
        if isinstance(layer, TransformerLayer)
        for name in (LINEARS[:2] if layer.is_moe_layer else LINEARS)
    ]


def attach(
    part: nn.Module,
    stack: str,
    architecture: Architecture,
    config: TransformerConfig,
    group: ProcessGroup,
    tile_rank: int = 0,
) -> None:
    """Give the linear layers of a part their adapters, but for those of experts
    (``model/expert_adapters``).

    Args:
        part, stack: as for ``linears``.
        architecture: the model, with the settings.
        config: megatron-core's configuration of the part.
        group: tensor-parallel ranks that share each layer.
        tile_rank: see ``LowRankAdapter``.
    """
    for key, target in linears(part, stack):
        if architecture.lora.adapts(key):
            adapter = LowRankAdapter(key, target.weight, architecture, config, group, tile_rank)
            add_adapter(target, adapter)


def add_adapter(target: nn.Module, adapter: LowRankAdapter) -> None:
    """Put an adapter beside a linear layer."""
    target.lora = adapter
    target.register_forward_hook(_add)


def _add(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple) -> tuple:
    """Add the adapter's output; torch calls this after the layer's forward."""
    projected, bias = output
    if module.lora.magnitude is None:
        return module.lora(inputs[0], projected), bias
    # Layers that do not return their bias have added it.
    own = module.bias if bias is None and module.bias is not None else projected.new_empty(0)
    if not own.numel():
        return module.lora.rescaled(module.weight, module.lora(inputs[0], projected)), bias
    adapted = module.lora(inputs[0], projected - own)
    return module.lora.rescaled(module.weight, adapted) + own, bias


@torch.no_grad()
def start_magnitudes(chunks: Sequence[nn.Module]) -> None:
    """Set the magnitudes that nothing has filled to the norms of their rows. Collective."""
    for chunk in chunks:
        for module in chunk.modules():
            lora = dict(module.named_children()).get("lora")
            if isinstance(lora, LowRankAdapter) and lora.magnitude is not None:
                norms = lora.norms(module.weight)
                if not lora.magnitude.any():
                    # Heads that only pad have rows of zeros.
                    lora.magnitude.copy_(torch.where(norms > 2 * SMALLEST_NORM, norms, 0))
