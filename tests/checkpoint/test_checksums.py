"""Checksums of a checkpoint's files, and what is said of a description that may not be
unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from megavlm.checkpoint import checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "__0_0.distcp").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "state.json").write_text("{}")
    checksums.write(tmp_path, {})
    return tmp_path


def _wrong(folder: Path, **options) -> list[str]:
    sums = checksums.read(folder)
    return checksums.differences(folder, sums, sums, **options)


def test_every_file_is_listed_with_its_size_and_checksum(folder: Path) -> None:
    assert json.loads((folder / checksums.FILE_NAME).read_text()) == {
        "shards/__0_0.distcp": [2304, zlib.crc32(bytes(range(256)) * 9)],
        "state.json": [2, zlib.crc32(b"{}")],
    }
    assert _wrong(folder) == []


def test_checksums_that_are_known_already_are_not_computed_again(folder: Path) -> None:
    checksums.write(folder, {"state.json": (7, 8)})
    assert checksums.read(folder)["state.json"] == (7, 8)


def test_files_of_other_machines_that_this_one_does_not_see_yet_are_listed(folder: Path) -> None:
    checksums.write(folder, {"shards/__1_0.distcp": (7, 8)})
    assert checksums.read(folder)["shards/__1_0.distcp"] == (7, 8)


def test_one_flipped_bit_is_found_by_content_and_not_by_size(folder: Path) -> None:
    path = folder / "shards" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    [line] = _wrong(folder)
    assert str(path) in line and "checksum" in line
    assert _wrong(folder, by_size_only=True) == []


@pytest.mark.parametrize("by_size_only", [False, True])
def test_files_that_are_cut_short_or_gone_are_named(folder: Path, by_size_only: bool) -> None:
    path = folder / "shards" / "__0_0.distcp"
    os.truncate(path, 100)
    (folder / "state.json").unlink()
    assert _wrong(folder, by_size_only=by_size_only) == [
        f"{path}: 100 bytes, 2,304 were written",
        f"{folder / 'state.json'}: missing",
    ]
    os.truncate(path, 2305)
    assert f"{path}: 2,305 bytes, 2,304 were written" in _wrong(folder, by_size_only=by_size_only)
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    assert f"{path}: cannot be read (Not a directory)" in _wrong(folder, by_size_only=by_size_only)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', '{"a": [1, "x"]}'])
def test_damaged_checksums_are_damage_too(folder: Path, content: str) -> None:
    (folder / checksums.FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=checksums.FILE_NAME):
        checksums.read(folder)


def test_a_description_of_shards_that_cannot_be_one_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    [line] = checksums.strangers(tmp_path / ".metadata")
    assert "getcwd" in line
    (tmp_path / ".metadata").unlink()
    assert checksums.strangers(tmp_path / ".metadata") == [f"{tmp_path / '.metadata'}: missing"]
