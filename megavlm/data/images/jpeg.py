"""JPEG files decoded by libjpeg-turbo through simplejpeg where it is installed: Pillow's pixels, in
less time.

A file is bytes FF D8, segments (FF, a marker, two bytes of length, content), the pixels' bits from
the marker SOS on, and the marker EOI.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

MAGIC = b"\xff\xd8\xff"
# Colour spaces of which RGB is made here as in Pillow; others, such as CMYK, are left to it.
COLOURS = ("YCbCr", "Gray")
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"
OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Bytes of the pixels' bits that ``is_whole`` has decoded.
TRIED_BYTES = 256
CUT_OFF = "premature end of data segment"


@cache
def load_jpeg_decoder() -> ModuleType | None:
    """simplejpeg, where it is installed."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return None
    return simplejpeg


def decode_jpeg(encoded: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode the pixels of a JPEG file, uint8 [height, width, 3]; return None if Pillow has to.

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


def is_whole(encoded: bytes, max_pixels: int) -> bool:
    """Whether a JPEG file is certain to be decoded, found in a tenth of the time that decoding
    takes; False: it has to be tried.

    Of files with one sequential scan, as cameras and most of the web make them, libjpeg refuses
    what has bad headers or tables, and what ends too early. Headers, tables and the scan's
    beginning are decoded here, and the end is looked for. Between them libjpeg takes any bits,
    wrong ones too, so decoding them would find nothing.

    Args:
        encoded: content of the file.
        max_pixels: a larger image is not looked at.
    """
    simplejpeg = load_jpeg_decoder()
    start = _scan_start(encoded)
    if simplejpeg is None or start is None or not _ends(encoded, start):
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in COLOURS or height * width > max_pixels:
            return False
        # An eighth of each side, which is worked out quickly.
        beginning = encoded[: start + TRIED_BYTES] + END_OF_IMAGE
        simplejpeg.decode_jpeg(
            beginning, colorspace="GRAY", min_height=1, min_width=1, min_factor=8
        )
    except ValueError as error:
        return CUT_OFF in str(error)
    return True


def _scan_start(encoded: bytes) -> int | None:
    """Where the bits of the only scan begin; None where the file has another frame than a
    sequential one, or its scan lacks a colour.
    """
    offset = len(MAGIC) - 1
    colours = 0
    while encoded[offset : offset + 1] == b"\xff" and offset + 10 <= len(encoded):
        marker = encoded[offset + 1]
        size = int.from_bytes(encoded[offset + 2 : offset + 4])
        if marker == START_OF_SCAN:
            return offset + 2 + size if 0 < colours == encoded[offset + 4] else None
        if marker in SEQUENTIAL_FRAMES and not colours:
            colours = encoded[offset + 9]
        elif (
            marker < 0xC0
            or marker in OTHER_FRAMES
            or marker in SEQUENTIAL_FRAMES
            or 0xD0 <= marker <= 0xD9
        ):
            return None
        offset += 2 + size
    return None


def _ends(encoded: bytes, start: int) -> bool:
    """Whether the first marker among a scan's bits is that of the image's end; markers that restart
    the decoder are part of the bits.
    """
    bits = np.frombuffer(encoded, np.uint8, offset=min(start, len(encoded)))
    markers = bits[1:][bits[:-1] == 0xFF]
    others = markers[(markers != 0) & (markers != 0xFF) & (markers >> 3 != 0xD0 >> 3)]
    return len(others) > 0 and others[0] == END_OF_IMAGE[1]
