"""Triton kernels that add a residual branch with layer scale and drop path, and their backward
pass. Each reads and writes every large tensor once.

What torch compiles of the same sum needs three kernels for its backward pass, of which two add up
columns at less than half of the memory's rate: it does not join what works element by element and
sums over rows.

Shapes: hidden, branch and gradients [N, I, D] for N tokens of I tiles; bias and scale [D]; keep
[I]. All calculate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_COLUMNS = 128
# Programs of the backward pass: about what one Hopper GPU runs at a time. Each adds up rows of a
# block of columns, and their number does not depend on the GPU, nor do the sums.
_PROGRAMS = 768


@triton.jit(do_not_specialize=["rows", "tiles"])
def _add(
    out,
    hidden,
    branch,
    bias,
    scale,
    keep,
    rows,
    tiles,
    WIDTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    added = tl.load(branch + place, mask=inside).to(tl.float32)
    added += tl.load(bias + column, mask=column < WIDTH).to(tl.float32)[None, :]
    if HAS_SCALE:
        added *= tl.load(scale + column, mask=column < WIDTH).to(tl.float32)[None, :]
    if HAS_KEEP:
        kept = tl.load(keep + row % tiles).to(branch.dtype.element_ty)
        added *= kept.to(tl.float32)[:, None]
    found = tl.load(hidden + place, mask=inside).to(tl.float32) + added
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _add_backward(
    of_branch,
    sums,
    grad,
    branch,
    bias,
    scale,
    keep,
    rows,
    tiles,
    WIDTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    TRAINS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < WIDTH
    added = tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + column, mask=in_width, other=0.0).to(tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        inside = (row < rows)[:, None] & in_width[None, :]
        through = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_KEEP:
            kept = tl.load(keep + row % tiles).to(grad.dtype.element_ty)
            through *= kept.to(tl.float32)[:, None]
        if TRAINS_SCALE:
            scaled = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            of_scale += through * (scaled + added[None, :])
        if HAS_SCALE:
            through *= factor[None, :]
        of_bias += through
        if HAS_SCALE or HAS_KEEP:
            tl.store(of_branch + place, through.to(of_branch.dtype.element_ty), mask=inside)
    place = sums + tl.program_id(0) * (2 if TRAINS_SCALE else 1) * WIDTH + column
    tl.store(place, tl.sum(of_bias, 0), mask=in_width)
    if TRAINS_SCALE:
        tl.store(place + WIDTH, tl.sum(of_scale, 0), mask=in_width)


def add(
    hidden: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Return ``hidden + (branch + bias) * scale * keep``; without a factor that is none."""
    (rows, tiles, width) = _sizes(hidden)
    out = torch.empty_like(hidden)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))
    _add[grid](
        out,
        hidden,
        branch,
        bias,
        scale,
        keep,
        rows,
        tiles,
        WIDTH=width,
        HAS_SCALE=scale is not None,
        HAS_KEEP=keep is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return out


def add_backward(
    grad: Tensor, branch: Tensor | None, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of branch, bias and scale.

    Args:
        grad: of what ``add`` returned.
        branch: as ``add`` got it; none: the scale is not trained.
        bias: likewise.
        scale: likewise.
        keep: likewise.
    """
    (rows, tiles, width) = _sizes(grad)
    is_same = scale is None and keep is None
    of_branch = grad if is_same else torch.empty_like(grad)
    columns = triton.cdiv(width, _COLUMNS)
    parts = min(max(_PROGRAMS // columns, 1), triton.cdiv(rows, _ROWS))
    count = 1 if branch is None else 2
    sums = torch.empty((parts, count, width), dtype=torch.float32, device=grad.device)
    _add_backward[(parts, columns)](
        of_branch,
        sums,
        grad,
        branch,
        bias,
        scale,
        keep,
        rows,
        tiles,
        WIDTH=width,
        HAS_SCALE=scale is not None,
        HAS_KEEP=keep is not None,
        TRAINS_SCALE=branch is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    (of_bias, *of_scale) = sums.sum(0).to(bias.dtype)
    return of_branch, of_bias, of_scale[0] if of_scale else None


def _sizes(hidden: Tensor) -> tuple[int, int, int]:
    """Return rows, tiles and width."""
    (tokens, tiles, width) = hidden.shape
    return tokens * tiles, tiles, width
