"""Experts of a layer as files of GPT-OSS hold them, all in one tensor, seen as those of each
expert; and back. Weights in MXFP4 (OCP Microscaling Formats, version 1.0) are seen as bfloat16.

Shape letters: E experts, D hidden size, M hidden size of an expert, R rows and C columns of a
matrix as it is in 4 bits.
"""

from __future__ import annotations

import re
from functools import reduce

import torch
from torch import Tensor

from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.views import Header, Tensors, View

_JOINED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
_CUT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.((?:gate_up_proj|down_proj)(?:_bias)?)")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of a matrix in MXFP4, which are exact in bfloat16.

    Args:
        blocks: two numbers of 4 bits in each, the lower bits first; uint8 [R, C / 32, 16].
        scales: exponents of 32 numbers each, plus 127; uint8 [R, C / 32].

    Returns:
        bfloat16 [C, R]: the transposed matrix, as the class of GPT-OSS has it.
    """
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - _SCALE_BIAS
    return torch.ldexp(values[codes.int()], exponents).flatten(-2).T.contiguous()


class CutExperts(View):
    """Show tensors with those of joined experts cut: ``experts.gate_up_proj`` [E, D, 2 M] into E
    times ``experts.0.gate_up_proj`` [D, 2 M], and likewise ``down_proj`` and the biases. Others are
    as they are, and so are all of a model whose experts have no biases.

    Args:
        source: the tensors.

    Raises:
        ValueError: blocks and scales of a weight in 4 bits do not belong together.
    """

    def __init__(self, source: Tensors):
        super().__init__(source)
        self._places: dict[str, tuple[str, int]] = {}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            found = _JOINED.fullmatch(name)
            if found is None or f"{found[1]}.{found[2]}_bias" not in source.headers:
                self.headers[name] = header
            elif found[3] == "_scales":
                self._require(name, name.removesuffix("_scales") + "_blocks")
            else:
                self._cut(name, header, found)

    def _cut(self, name: str, header: Header, found: re.Match) -> None:
        """Enter the tensors of each expert."""
        experts, *shape = header.shape
        suffix = found[3] or ""
        if suffix == "_blocks":
            scales = name.removesuffix("_blocks") + "_scales"
            self._require(name, scales)
            if self._source.headers[scales].shape != header.shape[:-1] or header.shape[-1] != 16:
                raise ValueError(
                    f"{self._source}: {name} has shape {list(header.shape)}, and {scales} has"
                    f" {list(self._source.headers[scales].shape)}; must be [.., n, 16] and [.., n]"
                )
            rows, groups, _ = shape
            header = Header((experts, 32 * groups, rows), torch.bfloat16)
            shape = [32 * groups, rows]
            suffix = ""
        for expert in range(experts):
            cut = f"{found[1]}.{expert}.{found[2]}{suffix}"
            self._places[cut] = (name, expert)
            self.headers[cut] = Header(tuple(shape), header.dtype)

    def _require(self, name: str, other: str) -> None:
        """Raise ValueError if one half of a weight in 4 bits is alone."""
        if other not in self._source.headers:
            raise ValueError(f"{self._source}: {name} is there, and {other} is missing")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            return self._source[name]
        joined, expert = self._places[name]
        if not joined.endswith("_blocks"):
            return self._source[joined][expert]
        scales = joined.removesuffix("_blocks") + "_scales"
        return from_mxfp4(self._source[joined][expert], self._source[scales][expert])

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        return None if name in self._places else self._source.ranges(name, rows)


class JoinedExperts(View):
    """Show tensors with those of each expert joined; the other way around as ``CutExperts``. One
    joined tensor at a time is in memory.

    Args:
        source: the tensors.
    """

    def __init__(self, source: Tensors):
        super().__init__(source)
        numbered: dict[str, dict[int, str]] = {}
        for name in source.headers:
            found = _CUT.fullmatch(name)
            if found is not None:
                numbered.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = name
        # In any order of the source: as text, 10 is before 2.
        self._parts = {name: [parts[n] for n in sorted(parts)] for name, parts in numbered.items()}
        joined = {names[0]: name for name, names in self._parts.items()}
        parts = {part for names in self._parts.values() for part in names}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            if name in joined:
                self.headers[joined[name]] = self._header(self._parts[joined[name]])
            elif name not in parts:
                self.headers[name] = header

    def _header(self, names: list[str]) -> Header:
        headers = [self._source.headers[name] for name in names]
        dtype = reduce(torch.promote_types, [header.dtype for header in headers])
        return Header((len(names), *headers[0].shape), dtype)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._source[name]
        header = self.headers[name]
        whole = torch.empty(header.shape, dtype=header.dtype)
        for number, part in enumerate(self._parts[name]):
            whole[number] = self._source[part]
        return whole

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        return None if name in self._parts else self._source.ranges(name, rows)
