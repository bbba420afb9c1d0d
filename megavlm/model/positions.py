"""Learned positions of patches.

Shape letters: P patches of several images, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, interpolate

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


def positions_of_patches(positions: Tensor, places: Tensor, sizes: Tensor) -> Tensor:
    """Interpolate learned positions to images of any size, corner to corner, as Qwen3-VL does
    (bilinear, weights in float32).

    Args:
        positions: [1, S * S, D], of S patches a side.
        places: int64 [2, P], row and column of each patch in its image.
        sizes: int64 [2, P], rows and columns that the image has.

    Returns:
        [P, D]
    """
    side = round(positions.shape[1] ** 0.5)
    exact = places.float() * ((side - 1) / (sizes - 1).clamp(min=1).float())
    first = exact.long().clamp(max=side - 1)
    second = (first + 1).clamp(max=side - 1)
    share = exact - first
    found = 0
    for row, row_share in ((first[0], 1 - share[0]), (second[0], share[0])):
        for column, column_share in ((first[1], 1 - share[1]), (second[1], share[1])):
            weight = (row_share * column_share)[:, None]
            found = found + embedding(row * side + column, positions[0]) * weight
    return found.to(positions.dtype)
