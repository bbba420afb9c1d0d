"""Few files stay open, those that were read last, and a read gives all that there is."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from megavlm.io import open_files
from megavlm.io.open_files import OpenFiles, allow_many, most_open


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in "abc"]
    for path in found:
        path.write_text(f"{path.name}0123456789")
    return found


def opened() -> list[str]:
    """Return the names of the test's files that this process has open."""
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    names = [link.readlink().name.removesuffix(" (deleted)") for link in links if link.exists()]
    return sorted(name for name in names if name in ("a", "b", "c"))


def test_the_files_that_were_read_last_stay_open_until_nobody_wants_them(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "most_open", lambda: 2)
    files = OpenFiles()
    for index, expected in ((0, "a"), (1, "ab"), (0, "ab"), (2, "ac"), (1, "bc")):
        assert files.read(paths[index], 0, 1) == paths[index].name.encode()
        assert opened() == list(expected)
    del files
    assert opened() == []


def test_a_file_that_is_opened_again_is_closed_before(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OpenFiles()
    files.read(paths[0], 0, 1)
    failures = [OSError(errno.ESTALE, "Stale file handle")]
    read = os.pread

    def fail_once(*arguments: int) -> bytes:
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(os, "pread", fail_once)
    before = os.stat(paths[0]).st_ino
    paths[0].with_name("new").write_text("other")
    os.replace(paths[0].with_name("new"), paths[0])  # as after a server has forgotten the file
    assert os.stat(paths[0]).st_ino != before
    assert files.read(paths[0], 0, 9) == b"other"
    assert opened() == ["a"]


def test_a_read_that_stops_early_goes_on_until_the_end_of_the_file(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of the system gives 2 GB at most."""
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: read(file, min(size, 3), start))
    assert OpenFiles().read(paths[0], 1, 9) == b"01234567"
    assert OpenFiles().read(paths[0], 8, 99) == b"789"


@pytest.mark.parametrize(("limit", "expected"), [(1024, 256), (256, 64), (10**6, 4096)])
def test_so_many_files_stay_open_that_others_find_room(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, 10**9))
    assert most_open() == expected


def test_a_run_may_open_as_many_files_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
    try:
        allow_many()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
