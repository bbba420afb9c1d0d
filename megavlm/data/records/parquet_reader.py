"""Annotation files that are parquet tables, with the fields of records as columns; images may be
bytes. Needs pyarrow.

A row is read with the row group that it is in, so tables of images should have row groups of some
hundred rows, as those of Hugging Face's datasets do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from megavlm.data.records.forms import LIST_KEYS
from megavlm.data.records.raw_record import OffsetRange, RawRecord
from megavlm.data.records.record import JSON
from megavlm.data.records.reject import RejectError, printable
from megavlm.io.remote import is_remote, open_file

# Row groups that a process keeps: a range of rows is in one, mostly.
ROW_GROUPS_KEPT = 2
# The packs take rows from everywhere; a table with larger groups than this would be read many times
# over.
MAX_ROW_GROUP_BYTES = 2**30


class ParquetFile:
    """A parquet table.

    Args:
        path: of the file.

    Raises:
        ValueError: pyarrow is missing or cannot read the file, or two columns have one name.
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
            self._file = pyarrow.parquet.ParquetFile(
                open_file(path) if is_remote(path) else path, page_checksum_verification=True
            )
            names = self._file.schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: not a parquet file that can be read ({printable(str(error), 300)})"
            ) from None
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: two columns are named {twice[0]!r}; rename one of them")
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"{path}: a row group of {largest} bytes; the packs take rows from everywhere, and"
                " each would read so much. Write it with smaller ones:"
                " pyarrow.parquet.write_table(table, path, row_group_size=200)"
            )
        self._rows = [group.num_rows for group in groups]
        self._bytes = [group.total_byte_size for group in groups]
        if min(self._rows, default=0) < 0 or sum(self._rows) != metadata.num_rows:
            raise ValueError(
                f"{path}: the row groups have {sum(self._rows)} rows, but the file's metadata says"
                f" {metadata.num_rows}; restore the file"
            )

    def ranges(self, length: int) -> Iterator[OffsetRange]:
        """See ``Reader``; offsets are rows, from 0."""
        start = 0
        for rows, size in zip(self._rows, self._bytes, strict=True):
            for first in range(0, rows, length):
                records = min(length, rows - first)
                yield OffsetRange(
                    offset=start + first,
                    number=start + first + 1,
                    records=records,
                    size=size * records // rows,
                )
            start += rows

    def read(self, offset: int, number: int, count: int) -> Iterator[RawRecord]:
        """See ``Reader``; raises ValueError if a row group cannot be read or lacks rows."""
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
            yield RawRecord(
                offset=offset + step,
                number=number + step,
                content=_row(_row_group(self, group), offset + step - start),
                location=f"row {number + step}",
            )

    def table(self, group: int) -> Any:
        """Return a row group as a table.

        Raises:
            ValueError: it cannot be read, or has other rows than the metadata says.
        """
        import pyarrow

        try:
            table = self._file.read_row_group(group)
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(
                f"{self.path}: row group {group} (rows {sum(self._rows[:group]) + 1} to"
                f" {sum(self._rows[: group + 1])}) cannot be read: {printable(str(error), 300)};"
                " restore the file"
            ) from None
        if table.num_rows != self._rows[group]:
            raise ValueError(
                f"{self.path}: row group {group} has {table.num_rows} rows, but its metadata says"
                f" {self._rows[group]}; restore the file"
            )
        return table


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def _row_group(file: ParquetFile, group: int) -> Any:
    """Return a row group of a file, kept for the rows after it."""
    return file.table(group)


def _row(table: Any, index: int) -> Mapping[str, Any] | RejectError:
    """Return the fields of a row; lists of turns may be JSON in a text."""
    try:
        row = table.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # such as a text that is not UTF-8
        return RejectError("malformed_json", f"the row cannot be read: {error}")
    fields = {name: value for name, value in row.items() if value is not None}
    for key in LIST_KEYS:
        value = fields.get(key)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            try:
                fields[key] = JSON.decode(value)
            except json.JSONDecodeError:
                continue  # the form says what the text is instead
            except (ValueError, RecursionError) as error:
                return RejectError("malformed_json", f"{key}: {error}")
    return fields
