"""The lock of a save folder, against real processes: living, killed, frozen and of elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
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
from megavlm.io import processes

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


@pytest.mark.parametrize(("ahead", "dead_seconds"), [(0, 1.0), (3600, 1.0), (-59, 60.0)])
def test_a_holder_elsewhere_without_signs_of_life_is_waited_for_and_then_dead(
    tmp_path: Path, other: multiprocessing.Process, ahead: int, dead_seconds: float
) -> None:
    other.kill()
    other.join()
    path = tmp_path / "run" / FILE_NAME
    from_elsewhere(path)
    touched = time.time() + ahead  # an hour ahead: the clock of the file system was set back
    os.utime(path, (touched, touched))
    start = time.monotonic()
    quick = QUICK | dict(dead_seconds=dead_seconds)
    with held(tmp_path / "run", tell=lambda text: None, **quick) as found:
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
            frozen.release()
            taker.check()
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


def test_a_frozen_holder_that_wakes_up_does_not_keep_the_lock_of_another_alive(
    tmp_path: Path,
) -> None:
    with held(tmp_path, beat_seconds=0.02):
        from_elsewhere(tmp_path / FILE_NAME)
        taken = json.loads((tmp_path / FILE_NAME).read_text()) | {"token": "taker"}
        (tmp_path / FILE_NAME).write_text(json.dumps(taken))
        os.utime(tmp_path / FILE_NAME, (1, 1))
        time.sleep(0.2)
        assert (tmp_path / FILE_NAME).stat().st_mtime == 1


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_taken_from_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lock._read
    failures = [None, None]  # as of a server of NFS that does not answer
    with held(tmp_path, beat_seconds=1000):
        os.utime(tmp_path / FILE_NAME, (1, 1))
        monkeypatch.setattr(lock, "_read", lambda path: failures.pop() if failures else read(path))
        with pytest.raises(LockedError, match="another run writes to this folder"), held(tmp_path):
            pass


def test_a_lock_that_is_given_up_while_it_is_looked_at_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE_NAME
    elsewhere = dataclasses.replace(lock._this_process(), boot="another")
    assert lock._create(path, elsewhere)
    stat = Path.stat
    looks: list[Path] = []

    def give_up(looked: Path, **options: bool) -> os.stat_result:
        found = stat(looked, **options)
        looks.append(looked)
        if looks.count(path) == 2:  # after the one for its age
            path.unlink(missing_ok=True)  # by its holder
        return found

    monkeypatch.setattr(Path, "stat", give_up)
    lock._wait_for_its_death(path, elsewhere, 0.1, 1.0, lambda text: None, "--checkpoint.save")


def test_a_lock_that_can_never_be_read_and_is_kept_alive_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    later = time.time() + 3600
    os.utime(tmp_path / FILE_NAME, (later, later))
    quick = dict(beat_seconds=0.1, dead_seconds=0.1)
    with pytest.raises(LockedError, match=f"{FILE_NAME} cannot be read"), held(tmp_path, **quick):
        pass


def test_where_processes_cannot_be_looked_up_a_holder_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boot_id", "namespace_id"):
        monkeypatch.setattr(processes, name, lambda: "")
    monkeypatch.setattr(processes, "start_ticks", lambda pid: None)
    with (
        held(tmp_path, **QUICK),
        pytest.raises(LockedError, match="another run writes to this folder"),
        held(tmp_path, tell=lambda text: None, **QUICK),
    ):
        pass


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


def test_a_full_disk_leaves_no_half_of_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), held(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_making_a_server_has_not_confirmed_is_the_makers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    with held(tmp_path, **QUICK) as found:
        found.check()


@pytest.mark.parametrize("is_here", [True, False])
def test_the_claim_of_a_taker_that_lives_is_its_own(tmp_path: Path, is_here: bool) -> None:
    claim = tmp_path / f"{FILE_NAME}_claim_dead"
    taker = lock._this_process()
    if not is_here:
        taker = dataclasses.replace(taker, boot="another")
    assert lock._create(claim, taker)
    assert not lock._take_over_claim(claim, dataclasses.replace(taker, token="late"))
    assert lock._read(claim) == taker


def test_a_claim_that_was_never_written_to_the_end_is_none_for_ever(tmp_path: Path) -> None:
    claim = tmp_path / f"{FILE_NAME}_claim_dead"
    claim.touch()
    os.utime(claim, (1, 1))
    assert not lock._take_over_claim(claim, lock._this_process())
    assert not claim.exists()


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
