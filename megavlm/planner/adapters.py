"""What adapters keep of a microbatch on a rank: for dropout, and outputs for DoRA."""

from __future__ import annotations

from typing import NamedTuple

from megavlm.config.lora import LINEARS
from megavlm.config.schema import Architecture, Parallel


class _LayerPlace(NamedTuple):
    """Where one of the layers of the whole model is.

    Attributes:
        is_vision: whether it is of the vision encoder.
        stem: that the keys of its weights begin with.
        tensor: ranks that share its columns and rows.
        split: ranks that share the tokens between them.
    """

    is_vision: bool
    stem: str
    tensor: int
    split: int


def _place(arch: Architecture, parallel: Parallel, layer: int) -> _LayerPlace:
    number = layer - arch.vision.num_layers
    if number < 0:
        return _LayerPlace(True, f"vision.encoder.layers.{layer}", parallel.vision_tensor_size, 1)
    tensor = parallel.tensor_model_parallel_size
    split = tensor if parallel.sequence_parallel else 1
    return _LayerPlace(False, f"language.decoder.layers.{number}", tensor, split)


def _adapted(arch: Architecture, place: _LayerPlace, widths: tuple[float, ...]) -> list[float]:
    """Return the width of each linear layer with an adapter, and 0 for the others. Adapters of
    experts have neither dropout nor DoRA.
    """
    has_experts = not place.is_vision and arch.language.num_experts > 0
    there = LINEARS[:2] if has_experts else LINEARS
    return [
        width if name in there and arch.lora.adapts(f"{place.stem}.{name}.weight") else 0.0
        for name, width in zip(LINEARS, widths, strict=True)
    ]


def dropped_copies(arch: Architecture, parallel: Parallel, layer: int) -> float:
    """Count the numbers a token that dropout keeps on a rank in one of the layers of the whole
    model: what it leaves of attention's output, which attention keeps too. Of other inputs nothing
    else needs the whole.
    """
    if not arch.lora.dropout:
        return 0.0
    place = _place(arch, parallel, layer)
    queries = arch.vision.hidden_size
    if not place.is_vision:
        queries = arch.language.num_attention_heads * arch.language.head_size
    return _adapted(arch, place, (0.0, queries / place.tensor, 0.0, 0.0))[1]


def dora_outputs(arch: Architecture, parallel: Parallel, layer: int) -> tuple[float, float]:
    """Count the outputs a token that the gradients of DoRA's magnitudes need, in one of the layers
    of the whole model: of the whole layer, and inside its MLP.
    """
    if not arch.lora.dora:
        return (0.0, 0.0)
    place = _place(arch, parallel, layer)
    part = arch.vision if place.is_vision else arch.language
    projected = 3 * part.hidden_size
    inner = part.ffn_hidden_size
    if not place.is_vision:
        heads = arch.language.num_attention_heads + 2 * arch.language.num_query_groups
        projected = heads * arch.language.head_size
        inner *= 2 if arch.language.is_gated else 1
    last = part.hidden_size / place.split
    widths = (projected / place.tensor, last, inner / place.tensor, last)
    kept = _adapted(arch, place, widths)
    return (sum(kept), sum(kept[2:]))
