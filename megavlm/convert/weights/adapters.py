"""LoRA adapters in checkpoints: merged into the weights beside them, or taken apart as PEFT has
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from megavlm.config.lora import is_adapter
from megavlm.config.schema import Architecture
from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import Dialect, rows
from megavlm.convert.weights.views import Header, Tensors


class Factors(NamedTuple):
    """The adapter of one linear layer of Hugging Face.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
    """

    a: Tensor
    b: Tensor


def adapted_rows(architecture: Architecture, dialect: Dialect = "native") -> Iterator[Row]:
    """Yield the rows of the weights that have an adapter; projections must be apart in the
    dialect's files, so it is not ``chat``.
    """
    return (row for row in rows(architecture, dialect) if architecture.lora.adapts(row.key))


def factor_keys(row: Row) -> tuple[str, str]:
    """Return the checkpoint keys of A and B beside a weight."""
    stem = row.key.removesuffix(".weight")
    return f"{stem}.lora.a", f"{stem}.lora.b"


def moves_rows(row: Row) -> bool:
    """Return whether a weight's operation is about its rows, which are those of B; else it cuts
    columns for heads that only pad.
    """
    return row.key.endswith(("linear_qkv.weight", "linear_fc1.weight"))


def factors(source: Tensors, row: Row) -> dict[str, Factors]:
    """Read the adapters of a weight of a checkpoint, by Hugging Face's name of the weight.

    Rows and columns for heads that only pad are cut off.
    """
    key_a, key_b = factor_keys(row)
    whole_b = source[key_b]
    parts_b = row.operation.split(whole_b) if moves_rows(row) else (whole_b,)
    parts_a = source[key_a].chunk(len(row.names))
    inputs = row.shape[1]
    return {
        name: Factors(a[:, :inputs], b)
        for name, a, b in zip(row.names, parts_a, parts_b, strict=True)
    }


class MergedAdapters:
    """The weights of a checkpoint with its adapters added to them, in float32.

    Args:
        source: weights and adapters.
        architecture: the model that they are of.
        dialect: that the model is to be written in.
    """

    def __init__(self, source: Tensors, architecture: Architecture, dialect: Dialect = "native"):
        self._source = source
        apart: Dialect = "native" if dialect == "chat" else dialect
        self._scale = architecture.lora.scale
        self._rows = {row.key: row for row in adapted_rows(architecture, apart)}
        self.headers = {
            key: Header(self._rows[key].shape, header.dtype) if key in self._rows else header
            for key, header in source.headers.items()
            if not is_adapter(key)
        }

    def __getitem__(self, key: str) -> Tensor:
        whole = self._source[key]
        row = self._rows.get(key)
        if row is None:
            return whole
        added = factors(self._source, row)
        parts = [
            weight.float() + self._scale * (added[name].b.float() @ added[name].a.float())
            for name, weight in row.split(whole).items()
        ]
        return row.join(parts).to(whole.dtype)

    def ranges(self, key: str, rows: range) -> list[Range] | None:
        """See ``Tensors``; a merged weight stands in no file."""
        return None if key in self._rows else self._source.ranges(key, rows)

    def __str__(self) -> str:
        return str(self._source)
