"""Annotation files of JSON: one object a line, or one list of objects, as LLaVA's are."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megavlm.data.records.raw_record import Block, Entry, in_blocks
from megavlm.data.records.reject import RejectError

# A record is some kilobytes. What is longer than this is no line of an annotation file, and would
# fill the memory of every worker.
MAX_ENTRY_BYTES = 2**26
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")


class JsonLines:
    """One JSON object a line; blank lines are no entries, but they count as lines."""

    def __init__(self, path: str) -> None:
        self.path = path

    def blocks(self, length: int) -> Iterator[Block]:
        """See ``EntryFile``; an entry is a line that is not blank."""
        first = (0, 1)
        number = 0
        entries = 0
        place = 0
        with open(self.path, "rb") as file:
            while line := _read_line(file):
                number += 1
                if not line.isspace():
                    entries += 1
                    first = (place, number) if entries == 1 else first
                place = file.tell()
                if entries == length:
                    yield Block(
                        offset=first[0], number=first[1], entries=entries, size=place - first[0]
                    )
                    entries = 0
            if entries:
                yield Block(
                    offset=first[0], number=first[1], entries=entries, size=place - first[0]
                )

    def read(self, offset: int, number: int, count: int) -> Iterator[Entry]:
        """See ``EntryFile``."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            while count:
                start = file.tell()
                line = _read_line(file)
                if not line:
                    return
                if not line.isspace():
                    yield Entry(
                        offset=start,
                        number=number,
                        content=_too_long() if len(line) > MAX_ENTRY_BYTES else line,
                    )
                    count -= 1
                number += 1


class JsonList:
    """One JSON list of objects. The objects are found by their brackets, so that the list is never
    in memory as a whole.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def blocks(self, length: int) -> Iterator[Block]:
        """See ``EntryFile``."""
        return in_blocks(self._places(None), length)

    def read(self, offset: int, number: int, count: int) -> Iterator[Entry]:
        """See ``EntryFile``."""
        with open(self.path, "rb") as file:
            for step, (start, end) in zip(range(count), self._places(offset), strict=False):
                file.seek(start)
                content = _too_long() if end - start > MAX_ENTRY_BYTES else file.read(end - start)
                yield Entry(offset=start, number=number + step, content=content)

    def _places(self, start: int | None) -> Iterator[tuple[int, int]]:
        """Where the elements from ``start`` (None: the first) begin and end. All behind a bracket
        that is never closed is one element.
        """
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if start is None:
                beginning = _BEGINNING.match(data)
                if beginning is None:
                    raise ValueError(
                        f"{self.path}: not a JSON list (it does not begin with a bracket); files of"
                        " one object a line end in .jsonl"
                    )
                start = beginning.end()
            depth = 0
            opened = start
            for token in _TOKEN.finditer(data, start):
                kind = data[token.start()]
                if kind in b"{[":
                    opened = opened if depth else token.start()
                    depth += 1
                elif kind in b"}]":
                    depth -= 1
                    if depth < 0:
                        return
                    if depth == 0:
                        yield opened, token.end()
                elif depth == 0:
                    yield token.start(), token.end()
            if depth:
                yield opened, len(data)


def _read_line(file: BinaryIO) -> bytes:
    """The next line; one that is too long is passed over in pieces, and cut off at one byte more
    than the limit.
    """
    line = file.readline(MAX_ENTRY_BYTES + 1)
    if len(line) > MAX_ENTRY_BYTES and not line.endswith(b"\n"):
        while (rest := file.readline(MAX_ENTRY_BYTES)) and not rest.endswith(b"\n"):
            pass
    return line


def _too_long() -> RejectError:
    return RejectError("malformed_json", f"longer than {MAX_ENTRY_BYTES} bytes, which no record is")


def is_list(path: Path) -> bool:
    """Whether a file is a JSON list, by its first characters."""
    with open(path, "rb") as file:
        return _BEGINNING.match(file.read(4096)) is not None
