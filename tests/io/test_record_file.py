"""Records are read in the order that they are asked for in, and neighbours at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.io import record_file
from megavlm.io.record_file import RecordFile
from megavlm.io.storage import LocalFiles, ReadError

RECORD = np.dtype([("a", "<i4"), ("b", "<i8")])
COUNT = 5000
VALUES = np.zeros(COUNT, RECORD)
VALUES["a"] = np.arange(COUNT)
VALUES["b"] = -np.arange(COUNT)


@pytest.fixture
def rows(tmp_path: Path) -> RecordFile:
    (tmp_path / "rows").write_bytes(b"header" + VALUES.tobytes() + b"behind")
    return RecordFile(LocalFiles(tmp_path), "rows", RECORD, COUNT, 6)


@pytest.mark.parametrize("indices", [[[4000, 3], [3, 0]], [], 4999, [0], np.arange(COUNT)[::-7]])
def test_records_come_in_the_order_and_shape_of_their_indices(rows: RecordFile, indices) -> None:
    expected = VALUES[np.asarray(indices, np.int64)]
    found = rows[indices]
    assert found.shape == expected.shape and np.array_equal(found, expected)


def test_neighbours_are_read_at_once_and_what_lies_between_others_is_not(
    rows: RecordFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    read = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles, "read", lambda self, *part: asked.append(part) or read(self, *part)
    )
    assert rows[[4000, 0, 9, 1]]["a"].tolist() == [4000, 0, 9, 1]
    size = RECORD.itemsize
    assert asked == [("rows", 6, 6 + 10 * size), ("rows", 6 + 4000 * size, 6 + 4001 * size)]


def test_many_neighbours_are_read_in_chunks(
    rows: RecordFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "CHUNK_BYTES", 100 * RECORD.itemsize)
    sizes = []
    read = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles,
        "read",
        lambda self, name, start, end: sizes.append(end - start) or read(self, name, start, end),
    )
    assert np.array_equal(rows[np.arange(50, 350)], VALUES[50:350])
    assert sizes == [count * RECORD.itemsize for count in (50, 100, 100, 50)]


@pytest.mark.parametrize("chunk", [1, 7 * RECORD.itemsize - 1, 2**24])
def test_a_column_is_read_in_parts(
    rows: RecordFile, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(record_file, "CHUNK_BYTES", chunk)
    assert np.array_equal(rows["b"], VALUES["b"])
    assert sum(map(len, rows.chunks())) == len(rows)


@pytest.mark.parametrize(
    ("indices", "told"),
    [([-1], "-1"), ([COUNT], "5000"), ([7, -2, 3], "-2 to 7"), ([COUNT, 2], "2 to 5000")],
)
def test_records_that_are_not_there_are_told(
    rows: RecordFile, indices: list[int], told: str
) -> None:
    with pytest.raises(IndexError, match=f"^rows run from 0 to 4999, not {told}$"):
        rows[indices]


def test_a_file_that_was_cut_off_is_named(rows: RecordFile) -> None:
    path = rows.files.folder / "rows"
    path.write_bytes(path.read_bytes()[: 6 + 20 * RECORD.itemsize - 1])
    assert rows[[18]]["a"] == 18
    with pytest.raises(ReadError, match=f"{path}: ends before row 20; the file is cut off"):
        rows[[18, 19]]
