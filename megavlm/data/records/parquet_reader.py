"""Annotation files that are parquet tables, with the fields of records as columns; images may be
bytes. Needs pyarrow.

A row is read with the row group that it is in, so tables of images should have row groups of some
hundred rows, as those of Hugging Face's datasets do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from megavlm.data.records.raw_record import Block, Entry

# Row groups that a process keeps: a block of rows is in one, mostly.
ROW_GROUPS_KEPT = 2
# The packs take rows from everywhere; a table with larger groups than this would be read many times
# over.
MAX_ROW_GROUP_BYTES = 2**30


class ParquetFile:
    """A parquet table; raises ValueError where pyarrow is missing or cannot read it.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise ValueError(
                f"{path}: parquet is read by pyarrow, which is not installed: pip install"
                " 'megavlm[parquet]'"
            ) from None
        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{path}: not a parquet file that can be read ({' '.join(str(error).split()):.300})"
            ) from None
        groups = [
            self._file.metadata.row_group(place)
            for place in range(self._file.metadata.num_row_groups)
        ]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"{path}: a row group of {largest} bytes; the packs take rows from everywhere, and"
                " each would read so much. Write it with smaller ones:"
                " pyarrow.parquet.write_table(table, path, row_group_size=200)"
            )
        self._rows = [group.num_rows for group in groups]
        self._bytes = [group.total_byte_size for group in groups]

    def blocks(self, length: int) -> Iterator[Block]:
        """See ``EntryFile``; offsets are rows, from 0."""
        start = 0
        for rows, size in zip(self._rows, self._bytes, strict=True):
            for first in range(0, rows, length):
                entries = min(length, rows - first)
                yield Block(
                    offset=start + first,
                    number=start + first + 1,
                    entries=entries,
                    size=size * entries // rows,
                )
            start += rows

    def read(self, offset: int, number: int, count: int) -> Iterator[Entry]:
        """See ``EntryFile``."""
        group = 0
        start = 0
        while group < len(self._rows) and start + self._rows[group] <= offset:
            start += self._rows[group]
            group += 1
        for step in range(count):
            while group < len(self._rows) and offset + step >= start + self._rows[group]:
                start += self._rows[group]
                group += 1
            if group == len(self._rows):
                return
            row = _row_group(self, group).slice(offset + step - start, 1).to_pylist()[0]
            yield Entry(offset=offset + step, number=number + step, content=_fields(row))

    def table(self, group: int) -> Any:
        """A row group as a table."""
        return self._file.read_row_group(group)


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def _row_group(file: ParquetFile, group: int) -> Any:
    """A row group of a file, kept for the rows after it."""
    return file.table(group)


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's fields; conversations may be JSON in a text."""
    fields = {name: value for name, value in row.items() if value is not None}
    if isinstance(fields.get("conversations"), str):
        with suppress(ValueError):  # a text is no conversation, which is then said of it
            fields["conversations"] = json.loads(fields["conversations"])
    return fields
