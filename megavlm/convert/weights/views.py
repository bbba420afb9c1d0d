"""All tensors of one side seen as those of the other: nothing is read before it is asked for, then
one tensor at a time.

That both sides match, name by name and shape by shape, is checked when a view is made, from the
headers of the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Protocol

import torch
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.convert.weights import byte_ranges
from megavlm.convert.weights.byte_ranges import Range, Run
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import Dialect, copied_head, rows, unused_rows
from megavlm.convert.weights.transforms import Shape

_LISTED = 8


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and type of every tensor, in the order in which they are best read."""

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """Bytes of files that hold some rows of a tensor; none where they must be read and put
        together.
        """

    def __str__(self) -> str:
        """Where they come from."""


def whole_ranges(tensors: Tensors, name: str) -> list[Range] | None:
    """Bytes of files that hold a tensor; none where it must be read and put together."""
    shape = tensors.headers[name].shape
    return tensors.ranges(name, range(shape[0])) if shape else None


class View(Mapping[str, Tensor]):
    """Tensors that are made of others, each when it is asked for.

    Args:
        source: the others.
    """

    headers: Mapping[str, Header]

    def __init__(self, source: Tensors):
        self._source = source

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __str__(self) -> str:
        return str(self._source)


class Overlaid(View):
    """Tensors, and others that are in memory, beside them or in their place.

    Args:
        source: the tensors.
        own: the others.
    """

    def __init__(self, source: Tensors, own: Mapping[str, Tensor]):
        super().__init__(source)
        self._own = own
        self.headers = dict(source.headers) | {
            name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._own[name] if name in self._own else self._source[name]

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``; what is in memory stands in no file."""
        return None if name in self._own else self._source.ranges(name, rows)


class MegatronView(View):
    """See tensors of Hugging Face's format as megatron-core's.

    The parts of one tensor may have several dtypes. It then has the narrowest dtype that holds all
    of them exactly (float32 for bfloat16 beside float16), and no part loses a bit.

    Args:
        source: Hugging Face's tensors.
        model: what they must be: a whole model, beside which unused layers stand, or the rows of
            one of its parts.
        dialect: that names those of a whole model.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or not of floating-point
            numbers; each is named. Or one cannot be joined.
    """

    def __init__(
        self, source: Tensors, model: Architecture | Sequence[Row], dialect: Dialect = "native"
    ):
        is_whole = isinstance(model, Architecture)
        table = rows(model, dialect) if is_whole else model
        listed = (*table, *unused_rows(model, dialect)) if is_whole else table
        wrong = _compare({name for row in listed for name in row.names}, source.headers)
        for name, shape in (
            (name, shape)
            for row in listed
            for name, shape in zip(row.names, row.part_shapes, strict=True)
        ):
            if name in source.headers and source.headers[name].shape != shape:
                wrong.append(
                    f"{name}: has shape {list(source.headers[name].shape)}, must be {list(shape)}"
                )
            elif name in source.headers and not source.headers[name].dtype.is_floating_point:
                wrong.append(
                    f"{name}: has dtype {_dtype_name(source.headers[name].dtype)}; quantised"
                    " weights cannot be trained, name a folder with floating-point ones"
                )
        _refuse(source, wrong)
        super().__init__(source)
        self._rows = {row.key: row for row in table}
        self.headers = {row.key: Header(row.shape, _joint_dtype(source, row)) for row in table}
        for row in table:
            if row.operation.checks_parts:
                self[row.key]  # raises what would otherwise come in the middle of a job

    def __getitem__(self, key: str) -> Tensor:
        row = self._rows[key]
        return row.join([self._read(key, name) for name in row.names])

    def _read(self, key: str, name: str) -> Tensor:
        """Return a part of the tensor ``key``, in that tensor's dtype."""
        return self._source[name].to(self.headers[key].dtype)

    @property
    def widened(self) -> set[str]:
        """Names of Hugging Face's tensors whose dtype is narrower than the joined tensor's."""
        return {
            name
            for key, row in self._rows.items()
            for name in row.names
            if self._source.headers[name].dtype != self.headers[key].dtype
        }

    def ranges(self, key: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        row = self._rows[key]
        if any(self._source.headers[name].dtype != self.headers[key].dtype for name in row.names):
            return None
        return _ranges(self._source, row.names, self._runs(key), rows)

    def part(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """Read what stands at ``index`` of a tensor; of tensors whose rows only move, nothing else
        is read.
        """
        row = self._rows[key]
        runs = self._runs(key)
        if runs is None:
            return self[key][index]
        begin, end, _ = index[0].indices(row.shape[0])
        sources = {
            number: self._source[row.names[number]] for number in {run.tensor for run in runs}
        }
        found = [
            sources[run.tensor][(slice(run.first, run.first + run.count), *index[1:])]
            for run in byte_ranges.within(runs, begin, end - begin)
        ]
        empty = next(iter(sources.values()))[(slice(0, 0), *index[1:])]
        dtype = self.headers[key].dtype
        return torch.cat([piece.to(dtype) for piece in found or [empty]])

    def _runs(self, key: str) -> list[Run] | None:
        return byte_ranges.joined_runs(self._rows[key].operation, self._rows[key].part_shapes)


class HuggingFaceView(View):
    """Tensors of megatron-core as Hugging Face's.

    Args:
        source: megatron-core's whole tensors.
        architecture: the model that they must be.
        dtype: dtype to turn them into, but for rows that keep their own; none: as they are.
        dialect: to name them in.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; each is named.
    """

    def __init__(
        self,
        source: Tensors,
        architecture: Architecture,
        dtype: torch.dtype | None = None,
        *,
        dialect: Dialect = "native",
    ):
        table = (*rows(architecture, dialect), *copied_head(architecture, dialect))
        wrong = _compare({row.key for row in table}, source.headers)
        for row in table:
            if row.key in source.headers and not row.operation.takes(
                source.headers[row.key].shape, row.shape
            ):
                wrong.append(
                    f"{row.key}: has shape {list(source.headers[row.key].shape)}, must be"
                    f" {list(row.shape)}"
                )
        _refuse(source, wrong)
        super().__init__(source)
        self._dtype = dtype
        self._rows = {name: row for row in table for name in row.names}
        self.headers = {
            name: Header(shape, self._dtype_of(row))
            for row in table
            for name, shape in zip(row.names, row.part_shapes, strict=True)
        }
        # Names that come out of one tensor are asked for one after the other.
        self._parts = lru_cache(maxsize=1)(self._split)

    def _split(self, row: Row) -> dict[str, Tensor]:
        return row.split(self._source[row.key])

    def __getitem__(self, name: str) -> Tensor:
        row = self._rows[name]
        return self._parts(row)[name].to(self._dtype_of(row))

    def _dtype_of(self, row: Row) -> torch.dtype:
        own = self._source.headers[row.key].dtype
        return own if self._dtype is None or row.keeps_dtype else self._dtype

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        row = self._rows[name]
        found = self._source.headers[row.key]
        if self._dtype_of(row) != found.dtype:
            return None
        runs = byte_ranges.split_runs(row.operation, found.shape)
        return _ranges(self._source, (row.key,), runs and runs[row.names.index(name)], rows)


def _joint_dtype(source: Tensors, row: Row) -> torch.dtype:
    """Return the narrowest dtype that holds every part of a row exactly."""
    dtypes = [source.headers[name].dtype for name in row.names]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as files write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _ranges(
    source: Tensors, names: Sequence[str], runs: list[Run] | None, rows: range
) -> list[Range] | None:
    """Bytes of files that hold the rows ``rows`` of what ``runs`` of tensors make up."""
    found = []
    for run in byte_ranges.within(runs or [], rows.start, len(rows)):
        piece = source.ranges(names[run.tensor], range(run.first, run.first + run.count))
        if piece is None:
            return None
        found += piece
    return None if runs is None else found


def _compare(expected: set[str], found: Collection[str]) -> list[str]:
    """Names that are missing and names that nothing takes."""
    present = set(found)
    missing = [f"{name}: missing" for name in sorted(expected - present)]
    return missing + [f"{name}: not a weight of this model" for name in sorted(present - expected)]


def _refuse(source: Tensors, wrong: list[str]) -> None:
    """Raise one error with everything that is wrong."""
    if wrong:
        more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        listed = "\n  ".join(wrong[:_LISTED] + more)
        raise ValueError(f"{source}: {len(wrong)} tensors do not fit the model:\n  {listed}")
