"""Patches of images of any size, as Fuyu has them (Adept, 2023; no paper): an image that is larger
than a limit is made smaller, keeping its shape, and filled up to whole patches on the right and
below.
"""

from __future__ import annotations

import numpy as np
from PIL import Image as PillowImage

# What fills up, of 0 to 255: the value of Fuyu's image processor.
FILL = 1


def fitted_size(width: int, height: int, limit: tuple[int, int]) -> tuple[int, int]:
    """Return the size in pixels, as (width, height), that an image is made smaller to; its own if
    it is inside the limit.

    Raises:
        ValueError: the image has no pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be cut into patches")
    if width <= limit[0] and height <= limit[1]:
        return width, height
    factor = min(limit[1] / height, limit[0] / width)
    return max(1, int(width * factor)), max(1, int(height * factor))


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return columns and rows of the patches of an image of ``size`` pixels, (width, height)."""
    return -(-size[0] // patch_size), -(-size[1] // patch_size)


def cut_patches(
    image: PillowImage.Image, size: tuple[int, int], patch_size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize an image, fill it up and cut it into patches, row by row.

    Args:
        image: the image, RGB.
        size: width and height that it is resized to.
        patch_size: side P of a patch in pixels.
        out: where the patches go; None: a new array.

    Returns:
        uint8 [rows * columns, 3, P, P].

    Raises:
        ValueError: ``out`` has another shape.
    """
    if image.size != size:
        image = image.resize(size, PillowImage.Resampling.BILINEAR)
    columns, rows = patch_grid(size, patch_size)
    filled = np.full((rows * patch_size, columns * patch_size, 3), FILL, np.uint8)
    filled[: size[1], : size[0]] = np.asarray(image)
    squares = filled.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    patches = squares.reshape(-1, 3, patch_size, patch_size)
    if out is None:
        return patches
    if out.shape != patches.shape:
        raise ValueError(f"room for {out.shape}, but the image gives patches of {patches.shape}")
    out[:] = patches
    return out
