"""Pixels as a model reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(tiles: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn pixels from 0 to 255 into numbers around 0: minus the mean of their colour, over its
    standard deviation.

    Args:
        tiles: uint8 [I, 3, S, S].
        mean, std: of pixels from 0 to 1, [3, 1, 1].
        dtype: of the result, which has the shape of the tiles.
    """
    return ((tiles.float() / 255 - mean.float()) / std.float()).to(dtype)
