"""What annotation files of every format are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megavlm.data.records.record import parse_json
from megavlm.data.records.reject import RejectError


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record as it stands in an annotation file.

    Args:
        offset: where it can be read again: in bytes, or a row, as the format has it.
        number: line, row or place in the file, from 1.
        content: the record as JSON, its fields, or why it has none.
        files: media that lie beside it in an archive, by name.
    """

    offset: int
    number: int
    content: bytes | Mapping[str, Any] | RejectError
    files: Mapping[str, bytes] = field(default_factory=dict)

    def fields(self) -> Mapping[str, Any]:
        """The record's fields; raises RejectError where it has none."""
        if isinstance(self.content, RejectError):
            raise self.content
        return parse_json(self.content) if isinstance(self.content, bytes) else self.content


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive entries of an annotation file.

    Args:
        offset: of the first.
        number: of the first.
        entries: how many.
        size: bytes of them in the file.
    """

    offset: int
    number: int
    entries: int
    size: int


def in_blocks(places: Iterable[tuple[int, int]], length: int) -> Iterator[Block]:
    """Blocks of at most ``length`` entries, which begin and end at ``places`` in the file and are
    numbered through from 1.
    """
    start = 0
    number = 1
    entries = 0
    end = 0
    for place, end in places:
        start = start if entries else place
        entries += 1
        if entries == length:
            yield Block(offset=start, number=number, entries=entries, size=end - start)
            number = number + entries
            entries = 0
    if entries:
        yield Block(offset=start, number=number, entries=entries, size=end - start)


class EntryFile(Protocol):
    """An annotation file, of any format."""

    def blocks(self, length: int) -> Iterator[Block]:
        """All entries in blocks of at most ``length``; cheap, as nothing is parsed."""

    def read(self, offset: int, number: int, count: int) -> Iterator[Entry]:
        """The ``count`` entries from ``offset`` on, the first of which is number ``number``."""
