"""Experts of a layer that a file holds as two tensors, as transformers 5 does in memory, seen as
three matrices of each expert, as files of published models hold them.

Shape letters: E experts, M hidden size of an expert, D hidden size.
"""

from __future__ import annotations

import re

from torch import Tensor

from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.joined_experts import CutExperts
from megavlm.convert.weights.views import Header, Tensors, View

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class SeparateExperts(View):
    """Show tensors with those of fused experts cut: ``gate_up_proj`` [E, 2 M, D] into E times
    ``gate_proj`` and ``up_proj`` [M, D], ``down_proj`` [E, D, M] into E times [D, M]. Others are as
    they are.

    Args:
        source: the tensors.
    """

    def __init__(self, source: Tensors):
        super().__init__(source)
        # Name of the fused tensor, and which of its rows, all experts counted through.
        self._slices: dict[str, tuple[str, range]] = {}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            found = _FUSED.fullmatch(name)
            if found is None or len(header.shape) != 3:
                self.headers[name] = header
                continue
            experts, rows, columns = header.shape
            parts = _PARTS[found[2]]
            size = rows // len(parts)
            for number in range(experts * len(parts)):
                expert, part = divmod(number, len(parts))
                cut = f"{found[1]}.{expert}.{parts[part]}.weight"
                self._slices[cut] = (name, range(number * size, (number + 1) * size))
                self.headers[cut] = Header((size, columns), header.dtype)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._slices:
            return self._source[name]
        fused, rows = self._slices[name]
        return self._source[fused].flatten(0, 1)[rows.start : rows.stop]

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        if name not in self._slices:
            return self._source.ranges(name, rows)
        fused, own = self._slices[name]
        header = self._source.headers[fused]
        whole = self._source.ranges(fused, range(header.shape[0]))
        if whole is None or len(whole) != 1:
            return None
        row_bytes = header.nbytes // (header.shape[0] * header.shape[1])
        offset = whole[0].offset + (own.start + rows.start) * row_bytes
        return [Range(whole[0].path, offset, len(rows) * row_bytes)]


def separate_experts(source: Tensors) -> Tensors:
    """Show the tensors of each expert by itself, in whichever way files hold those of a layer."""
    return SeparateExperts(CutExperts(source))
