"""Requests are made again after a pause, and bytes, copies and states are those of the store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.config import conf

from megavlm.io import remote
from megavlm.io.remote import FileState, RemoteError, file_state, local_copy, open_file, request

CONTENT = bytes(range(256)) * 4
URL = "memory://store/data.bin"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote._remote_state.cache_clear()
    system = fsspec.filesystem("memory")
    system.pipe_file("/store/data.bin", CONTENT)
    yield system
    system.rm("/store", recursive=True)
    remote._remote_state.cache_clear()


def failing(errors: list[Exception]) -> str:
    if errors:
        raise errors.pop(0)
    return "answer"


@pytest.mark.parametrize("failures", [0, 1, 4, 5])
def test_a_request_is_made_five_times_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    errors: list[Exception] = [KeyError(f"number {number}") for number in range(failures)]
    if failures < 5:
        assert request(URL, lambda: failing(errors)) == "answer"
    else:
        with pytest.raises(
            RemoteError, match=rf"^{URL}: no answer after 5 attempts .KeyError: 'number 4'"
        ):
            request(URL, lambda: failing(errors))
    assert pauses == [0.5, 1.0, 2.0, 4.0][: min(failures, 4)]


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, IsADirectoryError])
def test_what_no_other_request_changes_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: type[OSError]
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("waits"))
    with pytest.raises(kind, match="here"):
        request(URL, lambda: failing([kind("here")]))


@pytest.mark.parametrize("buffer", [1, 7, 2**16])
def test_a_file_is_read_from_any_place(
    store: fsspec.AbstractFileSystem, buffer: int, tmp_path: Path
) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT)
    moves = [
        (10, os.SEEK_SET, 20),
        (5, os.SEEK_CUR, 300),
        (-30, os.SEEK_CUR, 1),
        (-7, os.SEEK_END, 100),
        (2000, os.SEEK_SET, 5),
        (0, os.SEEK_SET, -1),
        (0, os.SEEK_END, 1),
    ]
    with open_file(URL, buffer) as far, open_file(str(tmp_path / "data.bin")) as near:
        for offset, whence, size in moves:
            assert far.seek(offset, whence) == near.seek(offset, whence)
            assert far.read(size) == near.read(size)
            assert far.tell() == near.tell()
        for file in (far, near):
            file.seek(1000)
        room = bytearray(100)
        assert far.readinto(room) == near.readinto(bytearray(100)) == 24
        assert room[:24] == CONTENT[1000:] and not any(room[24:])


def test_an_answer_that_is_too_short_is_asked_for_again(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    cat_file = type(store).cat_file
    left = [3]

    def cut(self, path, start=None, end=None, **options):
        data = cat_file(self, path, start=start, end=end, **options)
        left[0] -= 1
        return data[:-1] if left[0] > 0 else data

    monkeypatch.setattr(type(store), "cat_file", cut)
    with open_file(URL) as file:
        assert file.read() == CONTENT
    left[0] = 99
    with open_file(URL) as file, pytest.raises(RemoteError, match="1023 bytes came, and 1024 were"):
        file.read()


def test_a_copy_is_made_once_for_each_state_of_a_file(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_copy(URL)
    assert Path(first).read_bytes() == CONTENT
    made = os.stat(first)
    assert local_copy(URL) == first and os.stat(first).st_ino == made.st_ino
    assert Path(first).parent.stat().st_mode & 0o777 == 0o700
    os.truncate(first, 10)  # by a full disk, say
    assert local_copy(URL) == first and Path(first).read_bytes() == CONTENT
    store.pipe_file("/store/data.bin", CONTENT[::-1])
    remote._remote_state.cache_clear()
    second = local_copy(URL)
    assert second != first and Path(second).read_bytes() == CONTENT[::-1]
    assert sorted(os.listdir(Path(first).parent)) == sorted(map(os.path.basename, (first, second)))


def test_a_copy_that_fails_leaves_nothing(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "COPY_BYTES", 100)

    def full(self: object, amount: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(remote.Progress, "add", full)
        local_copy(URL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert Path(local_copy(URL)).read_bytes() == CONTENT


def test_states_and_names(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    state = file_state(URL)
    assert state.size == 1024 and str(state.version)[:2] == "20"
    assert remote.exists(URL) and not remote.exists("memory://store/nothing")
    with pytest.raises(FileNotFoundError, match="memory://store/nothing: there is no such file"):
        file_state("memory://store/nothing")
    for name in ("b-1", "b-0", "c"):
        store.pipe_file(f"/store/{name}.tar", b"")
    assert remote.find("memory://store/b-*.tar") == [
        "memory:///store/b-0.tar",
        "memory:///store/b-1.tar",
    ]
    path = tmp_path / "file"
    path.write_text("abc")
    os.utime(path, ns=(1, 1_000_000_007))
    assert file_state(str(path)) == FileState(size=3, version=1_000_000_007)
    assert remote.exists(str(path)) and not remote.exists(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("facts", "version"),
    [
        ({"ETag": "a", "LastModified": "b"}, "a"),
        ({"etag": "c", "mtime": 5.5}, "c"),
        ({"ETag": "", "mtime": 5.5}, "5.5"),
        ({}, ""),
    ],
)
def test_the_version_of_a_file_is_what_the_store_tells(
    store: fsspec.AbstractFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, object],
    version: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "info", lambda *_: {"size": 7, **facts})
        assert file_state(URL) == FileState(size=7, version=version)


def test_a_store_that_tells_no_size_is_named(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(RemoteError, match=f"^{URL}: the store does not tell the size"),
    ):
        patch.setattr(type(store), "info", lambda *_: {"size": None})
        file_state(URL)


def test_timeouts_are_set_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e .[dev]")
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 3)
    monkeypatch.setattr(remote, "READ_SECONDS", 4)
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 9}})
    for protocol in ("s3a", "http", "https"):
        monkeypatch.setitem(conf, protocol, {})  # remembers what was there
        del conf[protocol]
    remote._set_timeouts.cache_clear()
    for protocol in ("s3", "s3a", "http", "https", "memory"):
        remote._set_timeouts(protocol)
    assert conf["s3"]["config_kwargs"] == {"read_timeout": 9}
    given = {"connect_timeout": 3, "read_timeout": 4, "retries": {"max_attempts": 0}}
    assert conf["s3a"]["config_kwargs"] == given
    for protocol in ("http", "https"):
        limit = conf[protocol]["client_kwargs"]["timeout"]
        assert (limit.total, limit.sock_connect, limit.sock_read) == (None, 3, 4)
    assert "memory" not in conf
    remote._set_timeouts.cache_clear()
