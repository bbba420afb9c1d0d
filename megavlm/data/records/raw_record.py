"""The nouns of annotation files in any format, and the protocol that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megavlm.data.records.record import parse_json
from megavlm.data.records.reject import RejectError


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """One record as an annotation file stores it.

    Args:
        offset: where it can be read again: a byte or a row, depending on the format.
        number: line, row or number of the record, from 1.
        content: JSON text, fields, or the reason why it has neither.
        files: media that are stored beside it in an archive, by name.
        size: its bytes in the file; 0: not known.
        location: where it is, in words; empty: ``line NUMBER``.
    """

    offset: int
    number: int
    content: bytes | Mapping[str, Any] | RejectError
    files: Mapping[str, bytes] = field(default_factory=dict)
    size: int = 0
    location: str = ""

    def fields(self) -> Mapping[str, Any]:
        """Return the record's fields; raises RejectError if it has none."""
        if isinstance(self.content, RejectError):
            raise self.content
        return parse_json(self.content) if isinstance(self.content, bytes) else self.content

    def where(self) -> str:
        """Say where the record is, for people who repair the file."""
        return self.location or f"line {self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OffsetRange:
    """Consecutive records of an annotation file.

    Args:
        offset: of the first.
        number: of the first.
        records: how many.
        size: their bytes in the file.
    """

    offset: int
    number: int
    records: int
    size: int


def in_ranges(extents: Iterable[tuple[int, int]], length: int) -> Iterator[OffsetRange]:
    """Group records into ranges of at most ``length``; the records begin and end at ``extents``
    and are numbered from 1.
    """
    start = 0
    number = 1
    records = 0
    end = 0
    for offset, end in extents:
        start = start if records else offset
        records += 1
        if records == length:
            yield OffsetRange(offset=start, number=number, records=records, size=end - start)
            number = number + records
            records = 0
    if records:
        yield OffsetRange(offset=start, number=number, records=records, size=end - start)


class Reader(Protocol):
    """An annotation file of some format; ``readers.FORMATS`` is the table of implementations.

    No record may be lost in silence. A reader checks what lies between and behind the records and
    raises ValueError with the file and the position if it cannot tell how many records there are. A
    damaged record is one record whose ``content`` is a RejectError. A second count of the records,
    if the format has one, must agree.
    """

    def ranges(self, length: int) -> Iterator[OffsetRange]:
        """Yield all records in ranges of at most ``length``. Cheap: no record is parsed."""

    def read(self, offset: int, number: int, count: int) -> Iterator[RawRecord]:
        """Yield the ``count`` records from ``offset`` on; the first is record ``number``."""
