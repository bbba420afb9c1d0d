"""Small copies of images, for people to look at."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def thumbnail(path: Path, side: int) -> bytes:
    """Return a JPEG of an image that is at most ``side`` pixels wide and high.

    Raises:
        OSError: the file cannot be read, or is no image.
    """
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
