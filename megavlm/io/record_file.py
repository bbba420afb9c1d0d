"""Records of one size in a file, read on demand; however many there are, none stay in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megavlm.io.storage import Files, ReadError

# Records that lie closer together than this are read at once, but no more than a chunk.
GAP_BYTES = 1 << 14
CHUNK_BYTES = 1 << 24


class RecordFile:
    """The records of a file.

    ``records[indices]`` is an array of the records' type, in the order of the indices;
    ``records[name]`` is a whole column.

    Args:
        files: folder of the file.
        name: of the file.
        dtype: of a record.
        count: number of records.
        start: bytes before the first record.
    """

    def __init__(
        self, files: Files, name: str, dtype: np.dtype, count: int, start: int = 0
    ) -> None:
        self.files = files
        self.name = name
        self.dtype = dtype
        self.count = count
        self.start = start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: str | int | np.ndarray | list[int]) -> np.ndarray:
        """Read records or a column.

        Raises:
            IndexError: an index is out of range.
            ReadError: the file ends too early.
        """
        if isinstance(key, str):
            column = np.empty(self.count, self.dtype[key])
            filled = 0
            for chunk in self.chunks():
                column[filled : filled + len(chunk)] = chunk[key]
                filled += len(chunk)
            return column
        indices = np.asarray(key, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.count):
            least = indices.min()
            most = indices.max()
            asked = least if least == most else f"{least} to {most}"
            raise IndexError(f"rows run from 0 to {self.count - 1}, not {asked}")
        wanted, back = np.unique(indices, return_inverse=True)
        found = np.empty(len(wanted), self.dtype)
        places = wanted * self.dtype.itemsize
        is_far = np.diff(places) > GAP_BYTES
        breaks = np.flatnonzero(is_far | (np.diff(places // CHUNK_BYTES) > 0)) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(wanted)], strict=True):
            if first < last:
                run = self._read(int(wanted[first]), int(wanted[last - 1]) + 1)
                found[first:last] = run[wanted[first:last] - wanted[first]]
        return found[back].reshape(indices.shape)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all records, a part at a time."""
        step = max(1, CHUNK_BYTES // self.dtype.itemsize)
        for first in range(0, self.count, step):
            yield self._read(first, min(first + step, self.count))

    def _read(self, first: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = self.files.read(self.name, self.start + first * size, self.start + end * size)
        if len(data) != (end - first) * size:
            raise ReadError(
                f"{self.files.folder}/{self.name}: ends before row {end}; the file is cut off or"
                " changed"
            )
        return np.frombuffer(data, self.dtype)
