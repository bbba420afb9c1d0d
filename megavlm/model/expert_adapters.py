"""LoRA adapters beside the linear layers of experts, a pair of factors for each expert.

Experts that run one after the other have an adapter on each linear layer, as any linear layer has.
Transformer Engine's grouped layers compute the products of all experts of a rank at once; their
adapters run one after the other on the rows of their experts, whose numbers the host knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megavlm.config.lora import EXPERT_LINEARS
from megavlm.config.schema import Architecture
from megavlm.model.experts import mark_experts
from megavlm.model.lora import LowRankAdapter, add_adapter


class GroupedAdapters(nn.ModuleDict):
    """The adapters beside a grouped linear layer, by the number of the expert on this rank.

    Args:
        adapters: of the experts that have one.
    """

    def __init__(self, adapters: Mapping[int, LowRankAdapter]):
        super().__init__({str(number): adapter for number, adapter in adapters.items()})

    def forward(self, hidden: Tensor, projected: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the layer's output with the adapters' added to it [T, outputs].

        Args:
            hidden: what the layer reads [T, inputs], sorted by expert.
            projected: what it makes of it.
            sizes: rows of each expert.
        """
        parts = zip(hidden.split(sizes), projected.split(sizes), strict=True)
        adapted = [
            self[str(number)](rows, made) if str(number) in self else made
            for number, (rows, made) in enumerate(parts)
        ]
        return torch.cat(adapted)


def attach_to_experts(part: nn.Module, stack: str, architecture: Architecture) -> None:
    """Give the experts of this rank their adapters.

    Args:
        part: the language model of a chunk.
        stack: checkpoint key that its layers' keys begin with.
        architecture: the model, with the settings.
    """
    for layer in part.modules():
        if isinstance(layer, TransformerLayer) and layer.is_moe_layer:
            stem = f"{stack}.{layer.layer_number - 1}.mlp.experts"
            for name in EXPERT_LINEARS:
                _attach(layer.mlp.experts, stem, name, architecture)
            mark_experts(layer.mlp.experts)


def _attach(experts: nn.Module, stem: str, name: str, architecture: Architecture) -> None:
    """Give one of the linear layers of each expert its adapter.

    Args:
        experts: of a layer, on this rank.
        stem: checkpoint key that the experts' keys begin with.
        name: of the linear layer.
        architecture: the model, with the settings.
    """
    first = experts.groups.ep.rank() * experts.num_local_experts
    is_sequential = isinstance(experts, SequentialMLP)
    grouped: dict[int, LowRankAdapter] = {}
    for number in range(experts.num_local_experts):
        key = f"{stem}.{first + number}.{name}.weight"
        if not architecture.lora.adapts(key):
            continue
        own = f"local_experts.{number}.{name}"
        weight = experts.get_parameter(
            f"{own}.weight" if is_sequential else f"{name}.weight{number}"
        )
        adapter = LowRankAdapter(key, weight, architecture, experts.config, experts.groups.expt_tp)
        if is_sequential:
            add_adapter(experts.get_submodule(own), adapter)
        else:
            grouped[number] = adapter
    if grouped:
        target = experts.get_submodule(name)
        target.lora = GroupedAdapters(grouped)
        target.register_forward_hook(_add_grouped)


def _add_grouped(
    module: nn.Module, inputs: tuple[Tensor, Sequence[int]], output: tuple[Tensor, None]
) -> tuple[Tensor, None]:
    """Add the adapters' outputs; torch calls this after the grouped layer's forward."""
    hidden, sizes = inputs
    projected, bias = output
    return module.lora(hidden, projected, sizes), bias
