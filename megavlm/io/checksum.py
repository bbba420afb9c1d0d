"""Size and CRC-32 of contents that are read in chunks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 24

Sum = tuple[int, int]
"""Bytes and CRC-32 of a file."""


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, ``CHUNK_BYTES`` at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def measure(contents: Iterable[bytes]) -> Sum:
    """Return size and CRC-32 of chunks that follow each other."""
    size = 0
    checksum = 0
    for chunk in contents:
        size += len(chunk)
        checksum = zlib.crc32(chunk, checksum)
    return size, checksum
