"""Whether a video file or a GIF was cut off, as by a download or a copy that ended early. Decoders
play what is left of it without a word, but most files say how long their parts are.
"""

from __future__ import annotations

import io
from typing import BinaryIO

MATROSKA = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
# What MP4 and QuickTime files may begin with.
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# A file that lacks the end of another box lacks no frames.
_NEEDED_BOXES = (b"moov", b"moof", b"mdat")
# Some writers of AVI count the head of the file, too.
_AVI_SLACK = 8
# The extension of a GIF that tells of the next frame.
_GIF_CONTROL = b"\xf9"
# What writers of AVI that cannot go back, as into a pipe, give as a size.
_AVI_UNKNOWN = (0, 2**31 - 1, 2**32 - 1)


def check_whole(file: BinaryIO) -> None:
    """Raise ValueError if a video file is empty, or shorter than it says. MP4, QuickTime, Matroska,
    WebM and AVI say it, but not those that were streamed or whose recording broke off; nothing is
    known of those, and of other containers. Leaves the file at its start.
    """
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise ValueError("the file is empty")
    file.seek(0)
    head = file.read(12)
    if head.startswith(MATROSKA):
        stated = _end_of_segment(file)
    elif head.startswith(b"RIFF") and head.endswith(b"AVI "):
        stated = _end_of_chunks(file, size)
    elif head[4:8] in _FIRST_BOXES:
        stated = _end_of_boxes(file, size)
    else:
        stated = 0
    file.seek(0)
    if stated > size:
        raise ValueError(f"cut off: it has {size} bytes of the {stated} that it says it has")


def _end_of_segment(file: BinaryIO) -> int:
    """Return where the segment of a Matroska file ends; 0 if it does not say."""
    file.seek(len(MATROSKA))
    file.seek(_read_size(file), io.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return 0
    size = _read_size(file)
    return file.tell() + size if size else 0


def _read_size(file: BinaryIO) -> int:
    """Read the size of a Matroska element, whose first byte says how long it is; 0 if the size is
    not known.
    """
    first = file.read(1) or b"\0"
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return 0 if value == (1 << 7 * length) - 1 else value


def _end_of_chunks(file: BinaryIO, size: int) -> int:
    """Return where the last part of an AVI file ends; 0 if one does not say."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(8)
        if head[:4] != b"RIFF":
            break
        length = int.from_bytes(head[4:], "little")
        if length in _AVI_UNKNOWN:
            return 0
        end += 8 + length + length % 2
    return end if end - _AVI_SLACK > size else 0


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Return where the last box ends that frames of an MP4 or QuickTime file need."""
    start = 0
    end = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        name = head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or not name.isalnum():  # the last box, or no box
            break
        start += length
        if name in _NEEDED_BOXES:
            end = start
    return end


def is_gif_cut(file: BinaryIO) -> bool:
    """Return whether a GIF ends inside of a block, or before a frame that a block tells of. Some
    writers leave out the mark of its end, so it may end behind any frame.
    """
    file.seek(0)
    file.seek(_colour_bytes(file.read(13)[10:11]), io.SEEK_CUR)
    is_frame_near = False
    while (sign := file.read(1)) not in (b";", b""):
        if sign == b",":
            is_frame_near = False
            file.seek(_colour_bytes(file.read(9)[8:]) + 1, io.SEEK_CUR)
        elif sign == b"!":
            is_frame_near |= file.read(1) == _GIF_CONTROL
        else:  # between blocks, where readers skip what they do not know
            continue
        while (length := file.read(1)) not in (b"\0", b""):
            file.seek(length[0], io.SEEK_CUR)
        if not length:
            return True
    return not sign and is_frame_near


def _colour_bytes(flags: bytes) -> int:
    """Return the bytes of the colours that stand behind a byte of flags."""
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0
