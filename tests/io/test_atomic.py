"""Files and folders that appear whole or not at all, and state files that a power cut emptied."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megavlm.checkpoint import directory
from megavlm.io import atomic
from megavlm.io.atomic import new_folder


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record what is flushed and renamed, by inode, in order."""
    seen: list[tuple[str, int]] = []
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(descriptor: int) -> None:
        seen.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        seen.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return seen


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    path = tmp_path / "state.json"
    atomic.write_text(path, "{}")
    file = path.stat().st_ino
    assert events == [("flush", file), ("rename", file), ("flush", tmp_path.stat().st_ino)]
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


def test_all_of_a_folder_is_flushed_before_it_is_renamed(
    tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    growing = tmp_path / "growing"
    (growing / "inner").mkdir(parents=True)
    (growing / "inner" / "file").write_text("x")
    atomic.publish(growing, tmp_path / "out")
    out = tmp_path / "out"
    renamed = events.index(("rename", out.stat().st_ino))
    parts = (out, out / "inner", out / "inner" / "file")
    inside = {("flush", path.stat().st_ino) for path in parts}
    assert inside <= set(events[:renamed])
    assert events[renamed + 1 :] == [("flush", tmp_path.stat().st_ino)]


def test_a_checkpoint_is_flushed_once(tmp_path: Path, events: list[tuple[str, int]]) -> None:
    growing = tmp_path / "growing"
    (growing / "shards").mkdir(parents=True)
    for name in ("file", "shards/file", "shards/other"):
        (growing / name).write_text("x")
    target = tmp_path / "step_00000007"
    directory.publish(growing, target, flushed={"shards/file"})
    flushed = ("flush", (target / "file").stat().st_ino)
    assert events.count(flushed) == 1
    assert ("flush", (target / "shards" / "other").stat().st_ino) in events
    assert ("flush", (target / "shards").stat().st_ino) in events
    assert ("flush", (target / "shards" / "file").stat().st_ino) not in events
    renames = [("rename", path.stat().st_ino) for path in (target, tmp_path / "latest")]
    assert [event for event in events if event in (flushed, *renames)] == [flushed, *renames]


def test_what_a_program_holds_back_is_flushed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    atomic.write_bytes(tmp_path / "state.json", b"{}")
    assert sizes[0] == 2


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    atomic.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry for entry in tmp_path.iterdir() if not atomic.is_partial(entry)] == [path]


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b'{"rows": 1', b"\xff\xfe"])
def test_an_empty_or_cut_state_file_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    assert atomic.read_json(path) is None
    path.write_bytes(content)
    assert atomic.read_json(path) is None
    atomic.write_text(path, '{"rows": 1}')
    assert atomic.read_json(path) == {"rows": 1}
    path.write_bytes(b"[]")  # no crash leaves that there
    assert atomic.read_json(path) == {}


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(target, "--out") as growing:
        (growing / "half").touch()
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]
    with new_folder(target, "--out") as growing:
        (growing / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"] and list(
        target.parent.iterdir()
    ) == [target]
    with (
        pytest.raises(ValueError, match=r"--out .*deep/out: exists and is not an empty folder"),
        new_folder(target, "--out"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"--out .*out/file: exists and is not an empty folder"),
        new_folder(target / "file", "--out"),
    ):
        pass


def test_what_a_killed_process_left_of_a_new_folder_is_not_in_the_next(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "--out") as growing:
        left = growing.name
    (tmp_path / "out").rmdir()
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").touch()
    with new_folder(tmp_path / "out", "--out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_system_without_locks_takes_new_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with new_folder(tmp_path / "out", "--out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_into_one_new_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "--out") as growing:
        (growing / "half").touch()
        with (
            pytest.raises(ValueError, match="--out .*out: another process is writing it"),
            new_folder(tmp_path / "out", "--out"),
        ):
            pass
        assert (growing / "half").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "half"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "--out") as growing:
        (tmp_path / "out").mkdir()
        (growing / "file").touch()
    assert (tmp_path / "out" / "file").is_file()


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out"
    with (
        pytest.raises(OSError, match=f"--out {target}: nothing can be written there"),
        atomic.new_folder(target, "--out"),
    ):
        pass
