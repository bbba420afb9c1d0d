"""Which bytes of which files a converted tensor is made of. Most operations move whole rows, so
converting is copying ranges of files: nothing is read into memory, whatever the size of a tensor.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megavlm.convert.weights.transforms import Operation, Shape

_CHUNK_BYTES = 1 << 23


@dataclass(frozen=True)
class Range:
    """Bytes that stand together in a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Run:
    """Rows that stand together in one of several tensors.

    Args:
        tensor: which one, from 0.
        first: its first row.
        count: rows.
    """

    tensor: int
    first: int
    count: int


def joined_runs(operation: Operation, part_shapes: Sequence[Shape]) -> list[Run] | None:
    """Where the rows of ``operation.join(parts)`` stand in the parts; none where the operation does
    more than move rows.

    An operation that moves rows does the same with their numbers.
    """
    if not operation.moves_rows:
        return None
    numbers = []
    starts = []
    start = 0
    for shape in part_shapes:
        numbers.append(torch.arange(start, start + shape[0]))
        starts.append(start)
        start += shape[0] + 1  # the gap keeps the rows of two parts from standing together
    return list(_runs(operation.join(numbers), starts))


def split_runs(operation: Operation, whole: Shape) -> list[list[Run]] | None:
    """Where the rows of each tensor of ``operation.split`` stand in a whole one; none where the
    operation does more than move rows.
    """
    if not operation.moves_rows:
        return None
    return [list(_runs(part, [0])) for part in operation.split(torch.arange(whole[0]))]


def _runs(numbers: Tensor, starts: Sequence[int]) -> Iterator[Run]:
    """Numbers that follow each other, together."""
    breaks = ((numbers.diff() != 1).nonzero().flatten() + 1).tolist()
    for begin, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        number = int(numbers[begin])
        tensor = bisect_right(starts, number) - 1
        yield Run(tensor=tensor, first=number - starts[tensor], count=end - begin)


def within(runs: Iterable[Run], first: int, count: int) -> Iterator[Run]:
    """Cut from ``runs``, which make up a tensor, the runs of ``count`` rows from row ``first``
    on.
    """
    position = 0
    for run in runs:
        begin = max(first - position, 0)
        end = min(first + count - position, run.count)
        if begin < end:
            yield replace(run, first=run.first + begin, count=end - begin)
        position += run.count


def copy(ranges: Iterable[Range], target: BinaryIO) -> None:
    """Append ranges of files to an unbuffered file.

    Raises:
        OSError: a file is shorter than its ranges, or cannot be read or written.
    """
    for path, found in groupby(ranges, lambda piece: piece.path):
        with open(path, "rb", buffering=0) as source:
            for piece in found:
                _copy(source, piece, target)


def _copy(source: BinaryIO, piece: Range, target: BinaryIO) -> None:
    """Append one range, inside the kernel where the system can."""
    offset = piece.offset
    end = piece.offset + piece.nbytes
    in_kernel = True
    while offset < end:
        wanted = min(end - offset, _CHUNK_BYTES)
        copied = 0
        if in_kernel:
            try:
                copied = os.sendfile(target.fileno(), source.fileno(), offset, wanted)
            # not between these two files, or not on this system; what is really wrong shows below
            except OSError:
                in_kernel = False
        if not in_kernel:
            block = os.pread(source.fileno(), wanted, offset)
            write(memoryview(block), target)
            copied = len(block)
        if not copied:
            raise OSError(
                f"{piece.path}: ends at byte {offset}, before the end of a tensor at {end}"
            )
        offset += copied


def write_tensor(tensor: Tensor, target: BinaryIO) -> None:
    """Append a tensor's numbers to an unbuffered file."""
    write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()), target)


def write(content: memoryview, target: BinaryIO) -> None:
    """Append bytes to an unbuffered file, which may take them in several pieces."""
    while content:
        content = content[target.write(content) :]
