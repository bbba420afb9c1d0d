"""Sums of contents in chunks are those of the whole."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from megavlm.io import checksum


def test_chunks_have_the_sum_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "CHUNK_BYTES", 4)
    content = bytes(range(11))
    (tmp_path / "file").write_bytes(content)
    parts = list(checksum.chunks(tmp_path / "file"))
    assert list(map(len, parts)) == [4, 4, 3]
    assert checksum.measure(parts) == (11, zlib.crc32(content))
    assert checksum.measure([]) == (0, 0)
