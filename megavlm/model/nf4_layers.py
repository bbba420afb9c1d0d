"""Linear layers of megatron-core whose frozen weights are in 4 bits (``nf4``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megavlm.model.lora import linears
from megavlm.model.nf4 import Nf4Weight
from megavlm.model.vlm import VisionLanguageModel

_ROW_PARALLEL = ("linear_proj", "linear_fc2")


class _Dequantised:
    """Gives a linear layer its weight for the time of a forward pass. The backward pass dequantises
    it again: what autograd would keep is dropped.
    """

    def __init__(self) -> None:
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        """Put the weight in place; torch calls this before the layer's forward."""
        weight = module.nf4.whole()
        module.weight.data = weight
        address = weight.data_ptr()

        def save(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            is_weight = tensor.data_ptr() == address and tensor.numel() == weight.numel()
            return (tensor.size(), tensor.stride()) if is_weight else tensor

        def restore(saved: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            return module.nf4.whole().as_strided(*saved)

        hooks = torch.autograd.graph.saved_tensors_hooks(save, restore)
        hooks.__enter__()
        self._hooks.append(hooks)

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        """Let the weight go; torch calls this after the layer's forward, also if it failed."""
        self._hooks.pop().__exit__(None, None, None)
        clear(module)


def clear(module: nn.Module) -> None:
    """Leave a layer with a weight of its shape that takes no memory, and that no product can use
    unnoticed.
    """
    codes = module.nf4.codes
    nothing = torch.full((1, 1), torch.nan, dtype=module.nf4.dtype, device=codes.device)
    module.weight.data = nothing.expand(module.nf4.shape)


def mark_shards(chunk: VisionLanguageModel) -> None:
    """Say of each weight how tensor-parallel ranks share it, which megatron-core does with its
    initialisation alone; the norm of the gradient counts copies once by this.
    """
    axes = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in chunk.modules():
        for kind, axis in axes.items():
            if isinstance(module, kind) and "tensor_model_parallel" not in vars(module.weight):
                set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def layers(chunk: VisionLanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of a chunk whose weights are kept in 4 bits, with their keys."""
    parts = {"vision.encoder.layers": chunk.vision, "language.decoder.layers": chunk.language}
    for stack, part in parts.items():
        for key, module in [] if part is None else linears(part, stack):
            if chunk.architecture.lora.quantises(key):
                yield key, module


@torch.no_grad()
def quantise(chunks: Sequence[VisionLanguageModel], device: torch.device) -> list[nn.Module]:
    """Keep the weights of linear layers in 4 bits from now on. Collective; the chunks have their
    weights and are then moved to the device.

    Args:
        chunks: this rank's, on the CPU.
        device: where the chunks are to be.

    Returns:
        The layers; ``clear`` them when they are on the device.
    """
    found = []
    for chunk in chunks:
        for key, module in layers(chunk):
            groups = chunk.groups
            group = groups.vision.tp if key.startswith("vision.") else groups.collection.tp
            columns = module.weight.shape[1]
            is_cut = key.removesuffix(".weight").endswith(_ROW_PARALLEL)
            first = group.rank() * columns if is_cut else 0
            module.nf4 = Nf4Weight(module.weight, first, group if is_cut else None, device)
            # Moved as it is, so that no memory is taken for it on the device.
            module.weight.data = module.weight.new_empty(0)
            given = _Dequantised()
            module.register_forward_pre_hook(given.enter)
            module.register_forward_hook(given.leave, prepend=True, always_call=True)
            found.append(module)
    return found


def weights(chunks: Sequence[VisionLanguageModel]) -> dict[int, Nf4Weight]:
    """Return the weights in 4 bits by ``id`` of the parameter that stands for them."""
    return {id(module.weight): module.nf4 for chunk in chunks for _, module in layers(chunk)}
