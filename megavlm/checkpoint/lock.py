"""The lock of a folder that runs write to, such as a save folder: one run at a time, and a lock
that dies with its holder.

The lock is a file that says who holds it. A holder that was killed cannot remove it, so whoever
finds one asks whether the holder lives. On the same machine (same boot, same process namespace)
the process number and its start time answer at once. Anywhere else, as on a shared file system,
the holder's sign of life answers: it touches the file every few seconds, and a file that has not
been touched for longer than ``_DEAD_SECONDS`` is taken over. Ages are differences of times that
the file system gave, so clocks of machines need not agree. If clients give
the times, as on Lustre, they must agree within a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megavlm.io import atomic, processes

FILE_NAME = ".lock"
_SAVE = "--checkpoint.save"
_BEAT_SECONDS = 10.0
_DEAD_SECONDS = 90.0


class LockedError(ValueError):
    """A folder that another run writes to."""


@dataclass(frozen=True, kw_only=True)
class Holder(processes.ProcessId):
    """Who holds a lock; its process, and:

    Args:
        token: of this lock alone.
        host: name of the machine.
        since: when the lock was taken, in words.
    """

    token: str
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock:
    """A lock that this process holds, until it is released."""

    def __init__(self, path: Path, holder: Holder, beat_seconds: float):
        self._path = path
        self._holder = holder
        self._beat_seconds = beat_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="save folder lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lock is still this run's.

        Raises:
            OSError: another run has taken it over, since this one stood still for too long.
        """
        found = _read(self._path)
        if found is None or found.token != self._holder.token:
            taker = f"now held by {found}" if found else "gone"
            raise OSError(f"{self._path}: the lock of this run is {taker}; it no longer saves here")

    @property
    def is_gone(self) -> bool:
        """Whether nobody holds the lock: somebody removed it, or took it over and gave it up."""
        return not self._path.exists()

    def take_again(self) -> None:
        """Take a lock that is gone, unless another run is faster; its folder is made if need be.

        Raises:
            OSError: nothing can be written to the folder.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _create(self._path, self._holder)

    def release(self) -> None:
        """Give the lock up."""
        self._ended.set()
        self._thread.join()
        found = _read(self._path)
        if found is not None and found.token == self._holder.token:
            with contextlib.suppress(OSError):  # a disk that failed; the next run finds no holder
                self._path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            found = _read(self._path)
            if found is not None and found.token == self._holder.token:
                with contextlib.suppress(OSError):  # a full or slow disk; the next beat counts
                    os.utime(self._path)


@contextlib.contextmanager
def held(
    folder: Path,
    *,
    beat_seconds: float = _BEAT_SECONDS,
    dead_seconds: float = _DEAD_SECONDS,
    tell: Callable[[str], None] | None = None,
    flag: str = _SAVE,
) -> Iterator[Lock]:
    """Hold the lock of a folder, which is made if it is missing.

    Args:
        folder: the save folder, or another that one run at a time writes to.
        beat_seconds: time between two signs of life.
        dead_seconds: without one for so long, a holder that cannot be looked up counts as dead.
        tell: told before waiting for a sign of life; none: it is printed.
        flag: names the folder in errors.

    Raises:
        LockedError: another run holds it.
        OSError: nothing can be written to the folder.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    named = f"{flag} {folder}"
    holder = _this_process()
    unreadable_until = time.monotonic() + beat_seconds + dead_seconds
    while not _create(path, holder):
        found = _read(path)
        if found is None:
            if path.is_dir():
                raise LockedError(
                    f"{named}: {path} is a folder, and has the name of the lock of a run;"
                    " remove it, or name another folder"
                )
            time.sleep(0.05)  # it is being written or was just released
            if _read(path) is None and _age(path) > dead_seconds:
                path.unlink(missing_ok=True)  # never written to the end
            elif time.monotonic() > unreadable_until:
                raise LockedError(
                    f"{named}: {path} cannot be read, and another run keeps it alive; make"
                    " it readable, or remove it if no run writes to the folder"
                )
            continue
        _wait_for_its_death(path, found, beat_seconds, dead_seconds, tell or _print, named)
        if _take_over(path, found, holder):
            break
    lock = Lock(path, holder, beat_seconds)
    try:
        yield lock
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # something was saved there
                folder.rmdir()


def _this_process() -> Holder:
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        **asdict(processes.this_process()),
    )


def _create(path: Path, holder: Holder) -> bool:
    """Write the lock if there is none, whole or not at all: another name is linked to a file that
    is complete.
    """
    own = path.with_name(f"{FILE_NAME}_{holder.token}")
    try:
        own.write_text(json.dumps(asdict(holder)))
        os.link(own, path)
    except FileExistsError:
        return _is_of(path, holder)
    except OSError:  # a file system without links
        return _create_in_place(path, holder)
    finally:
        own.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, holder: Holder) -> bool:
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(holder)))
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _is_of(path: Path, holder: Holder) -> bool:
    """Return whether a lock that exists already is the holder's own: if the reply of a server of
    NFS is lost, the second try finds what the first one made.
    """
    found = _read(path)
    return found is not None and found.token == holder.token


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; none if nobody does, or if it is being written."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _age(path: Path) -> float:
    """Return seconds since the last sign of life, by the clock of the file system: a new file is
    compared with.
    """
    probe = path.with_name(f"{FILE_NAME}_{uuid.uuid4().hex}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _wait_for_its_death(
    path: Path,
    found: Holder,
    beat_seconds: float,
    dead_seconds: float,
    tell: Callable[[str], None],
    named: str,
) -> None:
    """Return once the holder is known to be dead, or has given the lock up.

    Raises:
        LockedError: the holder lives.
    """
    refusal = (
        f"{named}: another run writes to this folder ({found}); end it, or name another folder"
    )
    if found.is_here:
        if not found.has_ended:
            raise LockedError(refusal)
        return
    first = max(_age(path), 0.0)  # below 0 if a clock went back meanwhile
    if first > dead_seconds:
        return
    tell(
        f"{named}: locked by {found}, {first:.0f} s after its last sign of life;"
        f" waiting up to {dead_seconds - first:.0f} s for another one"
    )
    before = _touched(path)
    until = time.monotonic() + dead_seconds - first
    while (touched := _touched(path)) is not None:
        if touched != before:
            raise LockedError(refusal)
        if time.monotonic() > until:
            return
        time.sleep(beat_seconds / 4)


def _touched(path: Path) -> int | None:
    """Return the time of the last sign of life in nanoseconds; none if the lock was given up."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _take_over(path: Path, dead: Holder, holder: Holder) -> bool:
    """Put this run's lock in place of a dead one's; false if another run was faster.

    The claim, whose name holds the dead one's token, is a lock too: one run at a time has it, and
    the claim of a run that was killed is taken over in the same way.
    """
    claim = path.with_name(f"{FILE_NAME}_claim_{dead.token}")
    if not _create(claim, holder) and not _take_over_claim(claim, holder):
        time.sleep(0.05)
        return False
    try:
        found = _read(path)
        if found is None or found.token != dead.token:
            return False
        atomic.write_text(path, json.dumps(asdict(holder)))
        return True
    finally:
        claim.unlink(missing_ok=True)


def _take_over_claim(claim: Path, holder: Holder) -> bool:
    """Put this run's claim in place of one whose run was killed; false if that run may live."""
    found = _read(claim)
    if found is None:  # it was just given up, or never written to the end
        if _age(claim) > _DEAD_SECONDS:
            claim.unlink(missing_ok=True)
        return False
    is_dead = found.has_ended if found.is_here else _age(claim) > _DEAD_SECONDS
    return is_dead and _take_over(claim, found, holder)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
