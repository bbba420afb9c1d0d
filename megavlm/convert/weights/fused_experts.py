"""Experts of a layer that a file holds as two tensors, seen as three matrices of each expert, as
files of most published models hold them; and back. transformers 5 has them so in memory, the
outputs of a matrix first; files of Qwen3-VL's published models hold them with the inputs first.

Shape letters: E experts, M hidden size of an expert, D hidden size.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.joined_experts import CutExperts
from megavlm.convert.weights.views import Header, Tensors, View

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_SEPARATE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class SeparateExperts(View):
    """Show tensors with those of fused experts cut: ``gate_up_proj`` [E, 2 M, D] into E times
    ``gate_proj`` and ``up_proj`` [M, D], ``down_proj`` [E, D, M] into E times [D, M]; likewise if
    they are [E, D, 2 M] and [E, M, D]. Others are as they are.

    Args:
        source: the tensors.
    """

    def __init__(self, source: Tensors):
        super().__init__(source)
        # Name of the fused tensor, and which of its rows, all experts counted through.
        self._slices: dict[str, tuple[str, range]] = {}
        # Name of the fused tensor with the inputs first, which expert, and which of its columns.
        self._turned: dict[str, tuple[str, int, range]] = {}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            found = _FUSED.fullmatch(name)
            if found is None or len(header.shape) != 3:
                self.headers[name] = header
                continue
            experts, rows, columns = header.shape
            parts = _PARTS[found[2]]
            is_turned = self._has_inputs_first(found[1])
            if is_turned:
                columns, rows = header.shape[1:]
            size = rows // len(parts)
            for number in range(experts * len(parts)):
                expert, part = divmod(number, len(parts))
                cut = f"{found[1]}.{expert}.{parts[part]}.weight"
                self.headers[cut] = Header((size, columns), header.dtype)
                if is_turned:
                    self._turned[cut] = (name, expert, range(part * size, (part + 1) * size))
                else:
                    self._slices[cut] = (name, range(number * size, (number + 1) * size))

    def _has_inputs_first(self, stem: str) -> bool:
        """Return whether the two tensors of a layer are [E, D, 2 M] and [E, M, D]; no sizes fit
        both ways.
        """
        names = (f"{stem}.gate_up_proj", f"{stem}.down_proj")
        if not all(name in self._source.headers for name in names):
            return False
        (_, *first), (_, *second) = (self._source.headers[name].shape for name in names)
        return first == [second[1], 2 * second[0]]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._turned:
            fused, expert, columns = self._turned[name]
            own = self._source[fused][expert, :, columns.start : columns.stop]
            return own.T.contiguous()
        if name not in self._slices:
            return self._source[name]
        fused, rows = self._slices[name]
        return self._source[fused].flatten(0, 1)[rows.start : rows.stop]

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        if name in self._turned:
            return None
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


class FusedExperts(View):
    """Show tensors with those of the experts of a layer fused, the inputs first; the other way
    around as ``SeparateExperts``. One fused tensor at a time is in memory.

    Args:
        source: the tensors.
    """

    def __init__(self, source: Tensors):
        super().__init__(source)
        # By the name of a fused tensor: the names of its matrices, expert by expert.
        self._parts: dict[str, list[tuple[str, ...]]] = {}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            found = _SEPARATE.fullmatch(name)
            if found is None:
                self.headers[name] = header
                continue
            fused = next(key for key, names in _PARTS.items() if found[3] in names)
            whole = f"{found[1]}.{fused}"
            if whole not in self._parts:
                self._enter(whole, found[1], _PARTS[fused])

    def _enter(self, whole: str, stem: str, parts: tuple[str, ...]) -> None:
        """Enter a fused tensor."""
        experts: list[tuple[str, ...]] = []
        while f"{stem}.{len(experts)}.{parts[0]}.weight" in self._source.headers:
            number = len(experts)
            experts.append(tuple(f"{stem}.{number}.{part}.weight" for part in parts))
        header = self._source.headers[experts[0][0]]
        outputs, inputs = header.shape
        self._parts[whole] = experts
        self.headers[whole] = Header((len(experts), inputs, len(parts) * outputs), header.dtype)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._source[name]
        header = self.headers[name]
        whole = torch.empty(header.shape, dtype=header.dtype)
        for expert, names in enumerate(self._parts[name]):
            whole[expert] = torch.cat([self._source[part] for part in names]).T
        return whole

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        return None if name in self._parts else self._source.ranges(name, rows)


def separate_experts(source: Tensors) -> Tensors:
    """Show the tensors of each expert by itself, in whichever way files hold those of a layer."""
    return SeparateExperts(CutExperts(source))
