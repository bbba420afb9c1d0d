"""Triton kernel of dropout on the input of adapters: reads each number once and writes it once.

torch's operations for the hash of ``lora_dropout`` move some 125 bytes a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_COLUMNS = 128


@triton.jit
def _mix(values):
    """Apply the finalizer of MurmurHash3 (A. Appleby) to uint32."""
    values = values ^ (values >> 16)
    values = values * tl.full((), 0x85EBCA6B, tl.uint32)
    values = values ^ (values >> 13)
    values = values * tl.full((), 0xC2B2AE35, tl.uint32)
    return values ^ (values >> 16)


@triton.jit(do_not_specialize=["seed", "rows", "tiles", "first_row", "first_tile", "first_feature"])
def _multiply(
    out,
    values,
    seed,
    rows,
    tiles,
    first_row,
    first_tile,
    first_feature,
    LEAST: tl.constexpr,
    FACTOR: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    key = seed.to(tl.uint32, bitcast=True)
    owner = (first_row + row // tiles) * STRIDE + first_tile + row % tiles
    owner = _mix(_mix(owner.to(tl.uint32, bitcast=True)) + key)
    feature = _mix((first_feature + column).to(tl.uint32, bitcast=True) + key)
    drawn = _mix(owner[:, None] + feature[None, :]) & 0x7FFFFFFF
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    found = tl.load(values + place, mask=inside).to(tl.float32) * FACTOR
    kept = tl.where(drawn >= LEAST, found, 0.0)
    tl.store(out + place, kept.to(out.dtype.element_ty), mask=inside)


def multiply(
    values: Tensor, seed: int, least: int, factor: float, first: tuple[int, int, int], stride: int
) -> Tensor:
    """Return what ``lora_dropout.multiply`` does.

    Args:
        values: as there, and so are ``seed``, ``least`` and ``factor``.
        first: row, tile and feature that the values begin with.
        stride: between the hashed numbers of two rows, of which each tile adds one.
    """
    values = values.contiguous()
    (tokens, tiles, width) = values.shape
    rows = tokens * tiles
    out = torch.empty_like(values)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))
    _multiply[grid](
        out,
        values,
        seed,
        rows,
        tiles,
        *first,
        LEAST=least,
        FACTOR=factor,
        STRIDE=stride,
        WIDTH=width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return out
