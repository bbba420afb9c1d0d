"""Tar archives as groups of files, one group a record, with every byte between the files checked.

``tarfile`` stops in silence at a damaged header, at a cut between two files, and at the end of the
first of several archives in one file. Here each of them is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from megavlm.data.records.reject import printable
from megavlm.io.remote import open_file

BLOCK_BYTES = 512
CHUNK_BYTES = 2**20


def read_groups(path: str, offset: int = 0) -> Iterator[list[tarfile.TarInfo]]:
    """Yield the members of each record from ``offset`` on. Consecutive members whose names agree
    up to the first dot of their last part are one record; a name that comes again begins another.

    Raises:
        ValueError: not a tar archive, or one that is cut off, damaged between its files, or
            followed by another one; names the byte.
    """
    with open_file(path) as file:
        file.seek(offset)
        group: list[tarfile.TarInfo] = []
        names: set[str] = set()
        for member in _members(path, file, offset):
            if group and (record_key(group[0].name) != record_key(member.name)
                          or member.name in names):  # fmt: skip
                yield group
                group = []
                names = set()
            group.append(member)
            names.add(member.name)
        if group:
            yield group


def _members(path: str, file: BinaryIO, offset: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an archive, but not its folders and hidden files."""
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            # Members that were read stay listed in the archive; they are dropped, or a large
            # archive would fill the memory.
            while (member := archive.next()) is not None:
                archive.members = []
                last = printable(member.name, 200)
                if not member.isdir() and not os.path.basename(member.name).startswith("."):
                    yield member
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if not last and offset == 0:
            raise ValueError(f"{path}: not an uncompressed tar archive ({error})") from None
        raise ValueError(_cut(path, f"inside or behind {last} ({error})", file)) from None
    _check_end(path, file, end, last)


def _check_end(path: str, file: BinaryIO, end: int, last: str) -> None:
    """Raise ValueError unless an archive ends at byte ``end`` with a block of zeros, and nothing
    but zeros follows.
    """
    file.seek(end)
    block = file.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        raise ValueError(
            _cut(path, f"behind {last or 'its beginning'}", file)
            + "; if it is known to be whole, append the end: head -c 1024 /dev/zero >> "
            + path
        )
    if block.strip(b"\0"):
        raise ValueError(
            f"{path}: a damaged header at byte {end}, behind {last or 'the beginning'}; the records"
            " after it cannot be counted: restore the archive"
        )
    position = end + BLOCK_BYTES
    while chunk := file.read(CHUNK_BYTES):
        rest = chunk.lstrip(b"\0")
        if rest:
            raise ValueError(
                f"{path}: data at byte {position + len(chunk) - len(rest)}, behind the end of the"
                " archive; archives are joined with tar --concatenate, not with cat"
            )
        position += len(chunk)


def _cut(path: str, where: str, file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    return (
        f"{path}: the archive has no end: it is cut off or damaged at or before byte {size},"
        f" {where}; restore it"
    )


def record_key(name: str) -> str:
    """Return what the names of a record's files have in common."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def ending(name: str) -> str:
    """Return a file's ending as WebDataset reads it: all behind the first dot, in lower case."""
    return os.path.basename(name).partition(".")[2].lower()
