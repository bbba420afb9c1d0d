"""JPEG files decoded by libjpeg-turbo through simplejpeg where it is installed: Pillow's pixels, in
less time.

A file is bytes FF D8, segments (FF, a marker, two bytes of length, content), the pixels' bits from
the marker SOS on, and the marker EOI.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

MAGIC = b"\xff\xd8\xff"
# Colour spaces of which RGB is made here as in Pillow; others, such as CMYK, are left to it.
COLOURS = ("YCbCr", "Gray")
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"
# One of them stands in front of the pixels of a file that has an orientation.
SIGNS_OF_TURNS = (b"Exif\0\0", b"tiff:Orientation")
OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Bytes of the pixels' bits that ``is_whole`` has decoded.
TRIED_BYTES = 256
CUT_OFF = "premature end of data segment"
# Lines of pixels that ``is_whole`` has decoded, and what libjpeg says where there are bits of more.
TRIED_LINES = 64
MORE_LINES = re.compile(r"extraneous bytes before marker 0xd[0-79]$")
HEIGHT_PLACE = 5  # in the segment of a frame
# Segments that Pillow looks at, and their shortest contents.
TABLES = 0xDB
JFIF = 0xE0
EXIF = 0xE1
ICC = 0xE2
ADOBE = 0xEE
LOOKED_AT = frozenset({*SEQUENTIAL_FRAMES, TABLES, JFIF, EXIF, ICC, 0xED, ADOBE})
# Those, and what it leaves out as a whole. It takes DHP for a frame, and looks for markers in JPGn;
# FF only fills.
KNOWN = LOOKED_AT | {0xC4, 0xDD, 0xFE, *range(0xE3, 0xF0)}
JFIF_BYTES = 12
ICC_HEAD_BYTES = 14
ADOBE_BYTES = 12


class _Frame(NamedTuple):
    """The frame of a file, and where it is.

    Args:
        width: in pixels.
        height: in pixels.
        place: of the frame's segment.
        scan: where the bits of the only scan begin.
        is_plain: whether Pillow is certain to open the file, and finds the same size.
    """

    width: int
    height: int
    place: int
    scan: int
    is_plain: bool


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


def plain_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file of the most common kind, in pixels, found in a fraction of
    the time that Pillow takes; None: Pillow has to say what the file is.

    Args:
        head: the file's beginning, with the segments in front of the pixels' bits.
    """
    frame = _find_frame(head, as_pillow=True)
    return (frame.width, frame.height) if frame and frame.is_plain else None


def may_be_turned(head: bytes) -> bool:
    """Whether a JPEG file may have an orientation, in EXIF or XMP, so that Pillow has to say how it
    is to be turned; ``head`` as for ``plain_size``.
    """
    frame = _find_frame(head)
    return frame is None or any(sign in head[: frame.scan] for sign in SIGNS_OF_TURNS)


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
    frame = _find_frame(encoded)
    if simplejpeg is None or frame is None or not _ends(encoded, frame.scan):
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in COLOURS or height * width > max_pixels:
            return False
        # A few lines, and an eighth of each side, which is worked out quickly.
        few = min(height, TRIED_LINES).to_bytes(2)
        place = frame.place + HEIGHT_PLACE
        beginning = encoded[:place] + few + encoded[place + 2 : frame.scan + TRIED_BYTES]
        simplejpeg.decode_jpeg(
            beginning + END_OF_IMAGE, colorspace="GRAY", min_height=1, min_width=1, min_factor=8
        )
    except ValueError as error:
        return CUT_OFF in str(error) or bool(MORE_LINES.search(str(error)))
    return True


def _find_frame(encoded: bytes, as_pillow: bool = False) -> _Frame | None:
    """Find the frame of a file's only scan; None where the file has another frame than a sequential
    one, or its scan lacks a colour. ``as_pillow`` looks for what Pillow would stumble over, too.
    """
    offset = len(MAGIC) - 1
    place = colours = 0
    # What a segment may say of the pixels' density, which Pillow looks for in both.
    has_exif = has_density = False
    is_plain = as_pillow and encoded.startswith(MAGIC)
    while encoded[offset : offset + 1] == b"\xff" and offset + 10 <= len(encoded):
        marker = encoded[offset + 1]
        size = int.from_bytes(encoded[offset + 2 : offset + 4])
        end = offset + 2 + size
        if marker == START_OF_SCAN:
            if not 0 < colours == encoded[offset + 4]:
                return None
            height, width = struct.unpack_from(">HH", encoded, place + HEIGHT_PLACE)
            is_plain &= size >= 2 and end <= len(encoded) and height * width > 0
            is_plain &= has_density or not has_exif
            return _Frame(width, height, place, end, is_plain)
        if marker in SEQUENTIAL_FRAMES and not colours:
            place = offset
            colours = encoded[offset + 9]
        elif (
            marker < 0xC0
            or marker in OTHER_FRAMES
            or marker in SEQUENTIAL_FRAMES
            or 0xD0 <= marker <= 0xD9
        ):
            return None
        if is_plain and marker in LOOKED_AT:
            content = encoded[offset + 4 : end]
            is_plain &= _is_plain(marker, content)
            has_exif |= marker == EXIF and content.startswith(b"Exif")
            is_jfif = marker == JFIF and content.startswith(b"JFIF")
            has_density |= is_jfif and content[7:8] in (b"\1", b"\2")
        is_plain &= size >= 2 and marker in KNOWN
        offset = end
    return None


def _is_plain(marker: int, content: bytes) -> bool:
    """Whether Pillow reads nothing but what is expected in a segment."""
    if marker in SEQUENTIAL_FRAMES:
        colours = content[5:6]
        return (content[:1] == b"\x08" and colours in (b"\1", b"\3")) and len(
            content
        ) == 6 + 3 * colours[0]
    if marker == TABLES:  # 64 numbers of one byte each, behind their own number
        return len(content) % 65 == 0 and not any(number >> 4 for number in content[::65])
    if marker == JFIF:
        return not content.startswith(b"JFIF") or len(content) >= JFIF_BYTES
    if marker == ICC:
        return content.startswith(b"ICC_PROFILE\0") and len(content) > ICC_HEAD_BYTES
    if marker == ADOBE:
        return len(content) >= ADOBE_BYTES
    return marker == EXIF


def _ends(encoded: bytes, start: int) -> bool:
    """Whether the first marker among a scan's bits is that of the image's end; markers that restart
    the decoder are part of the bits.
    """
    bits = np.frombuffer(encoded, np.uint8, offset=min(start, len(encoded)))
    markers = bits[1:][bits[:-1] == 0xFF]
    others = markers[(markers != 0) & (markers != 0xFF) & (markers >> 3 != 0xD0 >> 3)]
    return len(others) > 0 and others[0] == END_OF_IMAGE[1]
