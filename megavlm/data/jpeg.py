"""JPEG files decoded by libjpeg-turbo through simplejpeg where it is installed: Pillow's pixels, in less time."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

MAGIC = b"\xff\xd8\xff"
# Colour spaces of which RGB is made here as in Pillow; others, such as CMYK, are left to it.
COLOURS = ("YCbCr", "Gray")


@cache
def load_jpeg_decoder() -> ModuleType | None:
    """simplejpeg, where it is installed."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return None
    return simplejpeg


def decode_jpeg(encoded: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of a JPEG file, uint8 [height, width, 3], or None where Pillow has to look at it.

    Args:
        encoded: content of the file.
        max_pixels: of a larger image nothing is decoded.
    """
    simplejpeg = load_jpeg_decoder()
    if simplejpeg is None or not encoded.startswith(MAGIC):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in COLOURS or height * width > max_pixels:
            return None
        return simplejpeg.decode_jpeg(encoded, colorspace="RGB")
    except ValueError:
        # Damaged, or unusual: Pillow says which.
        return None
