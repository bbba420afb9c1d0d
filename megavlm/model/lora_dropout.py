"""Dropout on the input of adapters, from a hash of what a number belongs to: the pack, the adapter,
the token or tile, and the feature. So it draws from no random state, and every layout drops the
same numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_STRIDE = 1 << 12  # more than the tiles of a pack on all ranks


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where the numbers that a rank holds are in the whole input of a layer.

    Args:
        draw: random number of the pack, of 31 bits.
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


def drop(hidden: Tensor, rate: float, salt: int, location: Location) -> Tensor:
    """Set a share of the numbers to zero, and divide the others by the share that is kept.

    Args:
        hidden: [rows, tiles or 1, features].
        rate: share that is dropped.
        salt: of the adapter.
        location: of ``hidden`` in the whole input.
    """
    options = dict(dtype=torch.int32, device=hidden.device)
    rows, tiles, features = hidden.shape
    seed = _signed(location.draw * 0x9E3779B1 + salt)
    row = torch.arange(location.first_row, location.first_row + rows, **options)
    tile = torch.arange(location.first_tile, location.first_tile + tiles, **options)
    feature = torch.arange(location.first_feature, location.first_feature + features, **options)
    owner = _mix(_mix(row[:, None] * _TILE_STRIDE + tile) + seed)
    drawn = _mix(owner[:, :, None] + _mix(feature + seed)) & 0x7FFFFFFF
    kept = drawn >= int(rate * 2**31)
    # The backward pass needs the mask, a byte a number.
    return torch.where(kept, hidden, 0.0) / (1 - rate)


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
