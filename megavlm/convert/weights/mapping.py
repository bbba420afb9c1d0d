"""A row of the tables of weights: one tensor of megatron-core, and what it is in Hugging Face's
files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megavlm.convert.weights.transforms import Operation, Same, Shape

SAME = Same()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        key: megatron-core's key; ``{}`` stands for the layer's number, from 0.
        names: Hugging Face's names, likewise.
        shape: of megatron-core's whole tensor, without padding.
        operation: between the two.
        keeps_dtype: whether exports in another dtype leave it in its own, as transformers does.
    """

    key: str
    names: tuple[str, ...]
    shape: Shape
    operation: Operation = SAME
    keeps_dtype: bool = False

    @property
    def part_shapes(self) -> tuple[Shape, ...]:
        """Shape of each of Hugging Face's tensors."""
        return self.operation.part_shapes(self.shape)

    def within(self, key: str, name: str, layer: int | str = "{}") -> Row:
        """Return the row with prefixes before its key and names, and with the layer's index filled
        in.
        """
        names = tuple((name + inner).format(layer) for inner in self.names)
        return replace(self, key=(key + self.key).format(layer), names=names)

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Hugging Face's tensors from megatron-core's."""
        return dict(zip(self.names, self.operation.split(whole), strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron-core's tensor from Hugging Face's, in the order of ``names``."""
        return self.operation.join(parts)


def layers(layer: Sequence[Row], key: str, name: str, count: int) -> Iterator[Row]:
    """Repeat the rows of one layer for every layer."""
    return (row.within(key, name, number) for number in range(count) for row in layer)


def within(rows: Iterable[Row], key: str, name: str) -> Iterator[Row]:
    """Rows with prefixes in front of keys and names."""
    return (row.within(key, name) for row in rows)


def linear(
    key: str,
    names: tuple[str, ...],
    shape: Shape,
    operation: Operation = SAME,
    *,
    bias: bool = True,
) -> list[Row]:
    """Weight and, where there is one, bias of a linear layer."""
    found = [Row(f"{key}.weight", tuple(f"{name}.weight" for name in names), shape, operation)]
    if bias:
        found.append(
            Row(f"{key}.bias", tuple(f"{name}.bias" for name in names), shape[:1], operation)
        )
    return found


def norm(key: str, name: str, size: int, kind: str = "RMSNorm") -> list[Row]:
    """Map a norm's weight and, for a LayerNorm, its bias."""
    parts = ("weight", "bias") if kind == "LayerNorm" else ("weight",)
    return [Row(f"{key}{part}", (f"{name}.{part}",), (size,)) for part in parts]
