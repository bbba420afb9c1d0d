"""Learned positions of patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

POSITIONS_KEY = "vision.position_embedding"


def resize_positions(positions: Tensor, grid: int, class_tokens: int = 1) -> Tensor:
    """Interpolate learned positions to another number of patches, as InternViT does (bicubic, in
    float32).

    Args:
        positions: [1, class tokens + patches, D], those of the class tokens first.
        grid: patches along a side that are wanted.
        class_tokens: tokens of no patch, 0 or 1.

    Returns:
        [1, class tokens + grid * grid, D]
    """
    native = round((positions.shape[1] - class_tokens) ** 0.5)
    if grid == native:
        return positions
    patches = positions[:, class_tokens:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)
    resized = interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat(
        [positions[:, :class_tokens], resized.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1
    )
