"""What adapters keep of a microbatch on a rank."""

from __future__ import annotations

from typing import NamedTuple

from megavlm.config.lora import LINEARS, stacked
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
    """Return the width of each linear layer with an adapter, and 0 for the others. Those of
    experts, which have neither dropout nor DoRA, are not counted.
    """
    has_experts = not place.is_vision and arch.language.num_experts > 0
    there = LINEARS[:2] if has_experts else LINEARS
    return [
        width if name in there and arch.lora.adapts(f"{place.stem}.{name}.weight") else 0.0
        for name, width in zip(LINEARS, widths, strict=True)
    ]


def kept_by_adapters(arch: Architecture, parallel: Parallel, layer: int) -> tuple[float, float]:
    """Count the numbers a token that adapters keep on a rank for the backward pass, in one of the
    layers of the whole model: of the whole layer, and inside its MLP.
    """
    if not arch.lora.rank:
        return (0.0, 0.0)
    place = _place(arch, parallel, layer)
    part = arch.vision if place.is_vision else arch.language
    first = [arch.lora.rank * number for number in _stacked(arch, place)]
    last = arch.lora.rank / place.split
    # What is between A and B.
    kept = _adapted(arch, place, (first[0], last, first[1], last))
    if arch.lora.dropout:
        # What it leaves of attention's output, which attention keeps too. Of other inputs nothing
        # else needs the whole.
        attended = part.hidden_size
        if not place.is_vision:
            attended = arch.language.num_attention_heads * arch.language.head_size
        kept[1] += _adapted(arch, place, (0.0, attended / place.tensor, 0.0, 0.0))[1]
    if arch.lora.dora:
        # The outputs, which the gradients of the magnitudes need.
        (projected, inner) = _outputs(arch, place)
        width = part.hidden_size / place.split
        outputs = _adapted(arch, place, (projected, width, inner, width))
        kept = [one + other for one, other in zip(kept, outputs, strict=True)]
    return (sum(kept), sum(kept[2:]))


def stacked_factors(arch: Architecture, parallel: Parallel, layer: int) -> tuple[float, float]:
    """Count the numbers, however many the tokens, that adapters keep likewise: B's beside zeros,
    where several A's are stacked.
    """
    if not arch.lora.rank:
        return (0.0, 0.0)
    place = _place(arch, parallel, layer)
    (queries, gate) = (
        arch.lora.rank * number * outputs if number > 1 else 0.0
        for number, outputs in zip(_stacked(arch, place), _outputs(arch, place), strict=True)
    )
    kept = _adapted(arch, place, (queries, 0.0, gate, 0.0))
    return (sum(kept), sum(kept[2:]))


def _stacked(arch: Architecture, place: _LayerPlace) -> tuple[int, int]:
    """Return the number of A's of queries, keys and values, and of the first layer of the MLP."""
    (queries, _, first, _) = (stacked(arch, f"{place.stem}.{name}.weight") for name in LINEARS)
    return queries, first


def _outputs(arch: Architecture, place: _LayerPlace) -> tuple[float, float]:
    """Return the outputs on a rank of the same two layers."""
    if place.is_vision:
        return (
            3 * arch.vision.hidden_size / place.tensor,
            arch.vision.ffn_hidden_size * (2 if arch.vision.is_gated else 1) / place.tensor,
        )
    language = arch.language
    heads = language.num_attention_heads + 2 * language.num_query_groups
    inner = language.ffn_hidden_size * (2 if language.is_gated else 1)
    return heads * language.head_size / place.tensor, inner / place.tensor
