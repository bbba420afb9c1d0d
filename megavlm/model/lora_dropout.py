"""Dropout on the input of adapters, from a hash of what a number belongs to: the pack, the adapter,
the token or tile, and the feature. So every layout drops the same numbers, and the backward pass
hashes again: no mask is kept.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_TILE_STRIDE = 1 << 12  # more than the tiles of a pack on all ranks


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where the numbers that a rank holds are in the whole input of a layer.

    Args:
        draw: random number of the pack, of 31 bits; see ``begin_pack``.
        first_row: of the tokens of a text, or of a tile.
        first_tile: of the pack.
        first_feature: of the layer's input.
    """

    draw: int
    first_row: int = 0
    first_tile: int = 0
    first_feature: int = 0


def adapter_salt(key: str) -> int:
    """Return the number of an adapter that its draws depend on, from its checkpoint key."""
    return zlib.crc32(key.encode())


def begin_pack(draw: int) -> None:
    """Make the random number of a pack what ``current_draw`` returns.

    It is the seed of the CPU's random state, from which nothing draws: what recomputes a layer in
    the backward pass (``CheckpointFunction`` of megatron-core, ``te_checkpoint``) first restores
    that state, also when other microbatches came between.
    """
    torch.default_generator.manual_seed(draw)


def current_draw() -> int:
    """Return the random number of the pack that is computed, or computed again."""
    return torch.initial_seed()


def drop(hidden: Tensor, rate: float, salt: int, location: Location) -> Tensor:
    """Set a share of the numbers to zero, and divide the others by the share that is kept.

    Args:
        hidden: [rows, tiles or 1, features].
        rate: share that is dropped.
        salt: of the adapter.
        location: of ``hidden`` in the whole input.
    """
    return _Drop.apply(hidden, rate, salt, location)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, rate: float, salt: int, location: Location
    ) -> Tensor:
        seed = _signed(location.draw * 0x9E3779B1 + salt)
        ctx.settings = (seed, int(rate * 2**31), 1 / (1 - rate), location)
        return _Drop.multiplied(hidden, ctx)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Drop.multiplied(grad, ctx), None, None, None

    @staticmethod
    def multiplied(values: Tensor, ctx: FunctionCtx) -> Tensor:
        function = multiply_by_kernel if values.is_cuda else multiply
        return function(values, *ctx.settings)


def multiply_by_kernel(
    values: Tensor, seed: int, least: int, factor: float, location: Location
) -> Tensor:
    """Return what ``multiply`` does, by one kernel, on a GPU."""
    from megavlm.model.triton_kernels import dropout_kernel

    first = (location.first_row, location.first_tile, location.first_feature)
    return dropout_kernel.multiply(values, seed, least, factor, first, _TILE_STRIDE)


def multiply(values: Tensor, seed: int, least: int, factor: float, location: Location) -> Tensor:
    """Return the values times ``factor``, or 0 if their draw is too small.

    Args:
        values: [rows, tiles or 1, features].
        seed: of the pack and the adapter, 32 bits with a sign.
        least: draw that keeps a number, of 31 bits.
        factor: of the numbers that are kept.
        location: of ``values`` in the whole input.
    """
    options = dict(dtype=torch.int32, device=values.device)
    rows, tiles, features = values.shape
    row = torch.arange(location.first_row, location.first_row + rows, **options)
    tile = torch.arange(location.first_tile, location.first_tile + tiles, **options)
    feature = torch.arange(location.first_feature, location.first_feature + features, **options)
    owner = _mix(_mix(row[:, None] * _TILE_STRIDE + tile) + seed)
    drawn = _mix(owner[:, :, None] + _mix(feature + seed)) & 0x7FFFFFFF
    return torch.where(drawn >= least, values * factor, 0.0)


def _mix(values: Tensor) -> Tensor:
    """Apply the finalizer of MurmurHash3 (A. Appleby) to int32, which wraps as uint32 does."""
    values = values ^ (values >> 16 & 0xFFFF)
    values = values * _signed(0x85EBCA6B)
    values = values ^ (values >> 13 & 0x7FFFF)
    values = values * _signed(0xC2B2AE35)
    return values ^ (values >> 16 & 0xFFFF)


def _signed(value: int) -> int:
    """Return the int32 with the last 32 bits of a number."""
    return (value + 2**31) % 2**32 - 2**31
