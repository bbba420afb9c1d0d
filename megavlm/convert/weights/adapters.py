"""LoRA adapters in checkpoints: merged into the weights beside them, or taken apart as PEFT has
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megavlm.config.lora import MAGNITUDE, SMALLEST_NORM, is_adapter
from megavlm.config.schema import Architecture
from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import Dialect, rows
from megavlm.convert.weights.views import Header, Tensors, View


class Factors(NamedTuple):
    """The adapter of one linear layer of Hugging Face.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
        magnitude: norms of the rows of the whole weight [outputs]; none without DoRA.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


def adapted_rows(architecture: Architecture, dialect: Dialect = "native") -> Iterator[Row]:
    """Yield the rows of the weights that have an adapter; projections must be apart in the
    dialect's files, so it is not ``chat``.
    """
    return (row for row in rows(architecture, dialect) if architecture.lora.adapts(row.key))


def factor_keys(row: Row) -> tuple[str, str]:
    """Return the checkpoint keys of A and B beside a weight."""
    stem = row.key.removesuffix(".weight")
    return f"{stem}.lora.a", f"{stem}.lora.b"


def magnitude_key(row: Row) -> str:
    """Return the checkpoint key of DoRA's norms of the rows of a weight."""
    return row.key.removesuffix(".weight") + MAGNITUDE


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
    parts_b = _of_rows(row, source[key_b])
    parts_a = source[key_a].chunk(len(row.names))
    inputs = row.shape[1]
    magnitudes: Sequence[Tensor | None] = [None for _ in row.names]
    if (key := magnitude_key(row)) in source.headers:
        magnitudes = _of_rows(row, source[key])
    return {
        name: Factors(a[:, :inputs], b, magnitude)
        for name, a, b, magnitude in zip(row.names, parts_a, parts_b, magnitudes, strict=True)
    }


def _of_rows(row: Row, whole: Tensor) -> tuple[Tensor, ...]:
    """Return what belongs to the rows of each of Hugging Face's weights."""
    return tuple(row.operation.split(whole)) if moves_rows(row) else (whole,)


class MergedAdapters(View):
    """The weights of a checkpoint with its adapters added to them, in float32.

    Args:
        source: weights and adapters.
        architecture: the model that they are of.
        dialect: that the model is to be written in.
        dtype: of the sums; None: that of their weights.
    """

    def __init__(
        self,
        source: Tensors,
        architecture: Architecture,
        dialect: Dialect = "native",
        dtype: torch.dtype | None = None,
    ):
        super().__init__(source)
        apart: Dialect = "native" if dialect == "chat" else dialect
        self._scale = architecture.lora.scale
        self._rows = {row.key: row for row in adapted_rows(architecture, apart)}
        self.headers = {
            key: Header(self._rows[key].shape, dtype or header.dtype)
            if key in self._rows
            else header
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
            self._merge(weight.float(), added[name]) for name, weight in row.split(whole).items()
        ]
        return row.join(parts).to(self.headers[key].dtype)

    def _merge(self, weight: Tensor, added: Factors) -> Tensor:
        """Return a weight with its adapter [outputs, inputs]."""
        whole = weight + self._scale * (added.b.float() @ added.a.float())
        if added.magnitude is None:
            return whole
        return (
            whole * (added.magnitude.float() / whole.norm(dim=1).clamp(min=SMALLEST_NORM))[:, None]
        )

    def ranges(self, key: str, rows: range) -> list[Range] | None:
        """See ``Tensors``; a merged weight stands in no file."""
        return None if key in self._rows else self._source.ranges(key, rows)
