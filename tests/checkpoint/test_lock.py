"""The lock of a save folder, against real processes: living, killed, frozen and of elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megavlm.checkpoint import lock
from megavlm.checkpoint.directory import is_own
from megavlm.checkpoint.lock import FILE_NAME, LockedError, held

FORK = multiprocessing.get_context("fork")
QUICK = dict(beat_seconds=0.1, dead_seconds=1.0)


def _hold(folder: Path, pipe: Connection) -> None:
    with held(folder, **QUICK):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[multiprocessing.Process]:
    """Start a process that holds the lock of ``run``."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.poll(60) and ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def from_elsewhere(path: Path) -> None:
    """Make a lock look as if another machine had taken it."""
    found = json.loads(path.read_text())
    time_before = path.stat().st_mtime_ns
    path.write_text(json.dumps(found | {"boot": "another", "host": "node7"}))
    os.utime(path, ns=(time_before, time_before))


def test_a_folder_is_locked_while_its_holder_lives(
    tmp_path: Path, other: multiprocessing.Process
) -> None:
    with (
        pytest.raises(
            LockedError, match=rf"another run writes to this folder \(process {other.pid}"
        ),
        held(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run" / FILE_NAME).exists()


def test_a_killed_holder_is_known_at_once(tmp_path: Path, other: multiprocessing.Process) -> None:
    other.kill()
    other.join()
    start = time.monotonic()
    with held(tmp_path / "run") as found:
        found.check()
        assert time.monotonic() - start < 5


def test_a_killed_holder_that_nobody_has_waited_for_is_dead(
    tmp_path: Path, other: multiprocessing.Process
) -> None:
    os.kill(other.pid, signal.SIGKILL)
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with held(tmp_path / "run"):
        pass


def test_another_process_with_the_holders_number_is_not_the_holder(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        path = tmp_path / "run" / FILE_NAME
        found = json.loads(path.read_text())
        assert found["pid"] == os.getpid() and found["started"].isdigit()
    path.parent.mkdir()
    path.write_text(json.dumps(found | {"started": "1"}))
    with held(tmp_path / "run"):
        pass


def test_a_holder_elsewhere_that_gives_signs_of_life_keeps_the_lock(
    tmp_path: Path, other: multiprocessing.Process
) -> None:
    from_elsewhere(tmp_path / "run" / FILE_NAME)
    told: list[str] = []
    with (
        pytest.raises(LockedError, match="on node7"),
        held(tmp_path / "run", tell=told.append, **QUICK),
    ):
        pass
    assert len(told) == 1 and "locked by process" in told[0] and "waiting up to" in told[0]


@pytest.mark.parametrize("ahead", [0, 3600])
def test_a_holder_elsewhere_without_signs_of_life_is_waited_for_and_then_dead(
    tmp_path: Path, other: multiprocessing.Process, ahead: int
) -> None:
    other.kill()
    other.join()
    path = tmp_path / "run" / FILE_NAME
    from_elsewhere(path)
    touched = time.time() + ahead  # an hour ahead: the clock of the file system was set back
    os.utime(path, (touched, touched))
    start = time.monotonic()
    with held(tmp_path / "run", tell=lambda text: None, **QUICK) as found:
        assert 0.5 < time.monotonic() - start < 10
        found.check()


def test_a_frozen_holder_that_was_taken_over_does_not_save_any_more(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder, beat_seconds=1000) as frozen:
        from_elsewhere(folder / FILE_NAME)
        os.utime(folder / FILE_NAME, (1, 1))
        with held(folder) as taker:
            taker.check()
            with pytest.raises(OSError, match="the lock of this run is now held by process"):
                frozen.check()
            frozen._beat_seconds = 0.0
        with pytest.raises(OSError, match="is gone"):
            frozen.check()


def test_a_lock_without_signs_of_life_for_long_is_taken_over_without_a_word(tmp_path: Path) -> None:
    with held(tmp_path, beat_seconds=1000):
        dead = (tmp_path / FILE_NAME).read_text()
    (tmp_path / FILE_NAME).write_text(dead)
    from_elsewhere(tmp_path / FILE_NAME)
    os.utime(tmp_path / FILE_NAME, (1, 1))
    told: list[str] = []
    with held(tmp_path, tell=told.append) as found:
        found.check()
    assert told == []


def test_a_lock_that_another_run_has_taken_over_meanwhile_stays_its_own(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    taker = lock._this_process()
    dead = dataclasses.replace(taker, token="dead")
    assert lock._create(path, taker)
    assert not lock._take_over(path, dead, dataclasses.replace(taker, token="late"))
    assert lock._read(path) == taker


@pytest.mark.slow
def test_one_of_many_takes_a_dead_lock_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder, beat_seconds=1000):
        path = folder / FILE_NAME
        from_elsewhere(path)
        os.utime(path, (1, 1))
        dead = path.read_text()
    for _ in range(5):
        folder.mkdir(exist_ok=True)
        path.write_text(dead)
        os.utime(path, (1, 1))
        most = _holders_at_once(folder, threads=8)
        assert most and max(most) == 1


def _holders_at_once(folder: Path, threads: int) -> list[int]:
    """Let threads ask for a lock at the same time; how many had it whenever one got it."""
    inside: list[int] = []
    most: list[int] = []

    def take(number: int) -> None:
        with contextlib.suppress(LockedError), held(folder):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    started = [threading.Thread(target=take, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return most


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with held(tmp_path / "new" / "run"):
        assert all(is_own(entry) for entry in (tmp_path / "new" / "run").iterdir())
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "old").mkdir()
    with held(tmp_path / "old"):
        pass
    assert list((tmp_path / "old").iterdir()) == []


def test_a_lock_whose_writer_was_killed_is_no_lock_for_ever(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    os.utime(tmp_path / FILE_NAME, (1, 1))
    with held(tmp_path) as found:
        found.check()


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_in_the_place_of_the_lock_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    (tmp_path / FILE_NAME).mkdir()
    start = time.monotonic()
    with pytest.raises(LockedError, match=f"{FILE_NAME} is a folder"), held(tmp_path, **QUICK):
        pass
    assert time.monotonic() - start < 0.5


def _refuse(*paths: object) -> None:
    raise PermissionError("no links here")


def test_without_links_there_is_still_one_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    holder = lock._this_process()
    assert lock._create(tmp_path / FILE_NAME, holder)
    assert not lock._create(tmp_path / FILE_NAME, dataclasses.replace(holder, token="other"))


def test_a_taker_that_was_killed_holds_the_next_one_up_no_longer_than_its_death_is_unknown(
    tmp_path: Path, other: multiprocessing.Process
) -> None:
    path = tmp_path / "run" / FILE_NAME
    of_the_taker = path.read_text()
    other.kill()
    other.join()
    from_elsewhere(path)
    os.utime(path, (1, 1))
    dead = json.loads(path.read_text()) | {"token": "dead"}
    path.write_text(json.dumps(dead))
    os.utime(path, (1, 1))
    path.with_name(f"{FILE_NAME}_claim_dead").write_text(of_the_taker)  # killed while it took over
    start = time.monotonic()
    with held(tmp_path / "run") as found:
        found.check()
    assert time.monotonic() - start < 10
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_that_cannot_be_removed_does_not_hide_why_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    with pytest.raises(SystemExit), held(tmp_path):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise SystemExit(2)
    monkeypatch.undo()
    assert (tmp_path / FILE_NAME).exists()
