"""Triton kernel that dequantises weights of 4 bits: reads each byte once, and writes each number.

torch's operations for it move some 20 bytes a number, and take 8 bytes a number of memory.

Shape letters: R rows, C columns on this rank, B blocks that these are in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit(do_not_specialize=["left"])
def _dequantise(
    out,
    codes,
    pairs,
    scales,
    left,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    place = left + column
    byte = tl.load(codes + row * (BLOCKS * BLOCK // 2) + place // 2, mask=inside, other=0)
    share = tl.load(pairs + byte.to(tl.int32) * 2 + place % 2)
    scale = tl.load(scales + row * BLOCKS + place // BLOCK, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, (share * scale).to(out.dtype.element_ty), mask=inside)


def dequantise(
    codes: Tensor, pairs: Tensor, scales: Tensor, left: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [R, C].

    Args:
        codes: uint8 [R, B * 32], two numbers a byte, the first in the upper half.
        pairs: float32 [256, 2], what a byte means, as shares of its block's largest number.
        scales: float32 [R, B].
        left: numbers of the first block that the rank does not have.
        columns: C.
        dtype: of the weight.
    """
    (rows, blocks) = scales.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    _dequantise[rows, triton.cdiv(columns, _COLUMNS)](
        out,
        codes,
        pairs,
        scales,
        left,
        WIDTH=columns,
        BLOCKS=blocks,
        BLOCK=2 * codes.shape[1] // blocks,
        COLUMNS=_COLUMNS,
    )
    return out
