"""Annotation files cut into ranges of records, of which tasks are made.

Lines are counted a million a second, and parquet says how many rows it has. But the records of an
archive are found by going from one header to the next, ten thousand records a second, as fast as a
worker encodes them. So workers go through archives, some files ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megavlm.data.packing.executors import Executor, ordered_map
from megavlm.data.records.raw_record import OffsetRange
from megavlm.data.records.readers import find_format, open_reader

# Workers that encode for each one that goes through archives.
ENCODING_WORKERS = 4


@dataclass(frozen=True, kw_only=True)
class FileToCut:
    """An annotation file, and how it is cut.

    Args:
        path: of the file.
        records: most records of a range.
        share: of its records that are taken, the first ones; rounded down.
    """

    path: str
    records: int
    share: float = 1.0


def cut_files(
    files: Sequence[FileToCut], workers: int, executor: Executor
) -> Iterator[Iterable[OffsetRange]]:
    """Yield the ranges of each file. Those of archives are found by other processes, if there are
    several archives.

    Args:
        files: to be cut.
        workers, executor: that encode the records, as for ``ordered_map``.

    Raises:
        ValueError: a file is damaged, so that its records cannot be counted.
    """
    archives = [file for file in files if find_format(file.path).is_walked]
    beside = len(archives) > 1
    found = ordered_map(list_ranges, archives, -(-workers // ENCODING_WORKERS), executor)
    for file in files:
        by_workers = beside and find_format(file.path).is_walked
        yield next(found) if by_workers else _ranges(file)


def list_ranges(file: FileToCut) -> list[OffsetRange]:
    """Return the ranges of a file; in a worker."""
    return list(_ranges(file))


def _ranges(file: FileToCut) -> Iterator[OffsetRange]:
    """Yield the ranges of a file, or of its share."""
    ranges = open_reader(file.path).ranges(file.records)
    if file.share >= 1:
        yield from ranges
        return
    every = list(ranges)
    left = int(sum(extent.records for extent in every) * file.share)
    for extent in every:
        if left > 0:
            yield dataclasses.replace(extent, records=min(extent.records, left))
        left -= extent.records
