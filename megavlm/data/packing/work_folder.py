"""The folder of an unfinished job, such as a packing: one process at a time works in it, and only
the same job resumes in it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megavlm.data.packing.job_state import DamagedStateError
from megavlm.io import atomic

JOB_NAME = "job.json"
LOCK_NAME = "lock"
SHOWN_DIFFERENCES = 8


def refuse_filled(out: Path) -> None:
    """Raise FileExistsError if the folder of a job's result holds something."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"--out {out}: already holds something; give another folder, or remove it"
        )


def partial_of(out: Path) -> Path:
    """Return the folder that becomes ``out`` when it is complete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def partial_folder(
    folder: Path, identity: dict[str, Any], *, flag: str, prepared: Sequence[str] = ()
) -> Iterator[Path]:
    """Make a folder for a job, or enter the one that the same job left; it stays when the job ends
    with an error. Another job takes the folder over if the one before had done nothing yet.

    Args:
        folder: of the work.
        identity: what makes a job the same; JSON.
        flag: the flag that the folder comes from, for errors.
        prepared: names of what a job writes there before its work begins.

    Raises:
        FileExistsError: another process works there, or another job was stopped there.
        OSError: nothing can be written there, or nothing locked.
        ValueError: a file that a stopped job left there is damaged.
    """
    atomic.make_folder(folder, flag)
    identity = json.loads(json.dumps(identity))
    with open(folder / LOCK_NAME, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{flag}: another process is at work in {folder}; wait for it, or give"
                " another folder"
            ) from None
        except OSError as error:
            raise OSError(
                f"{flag}: the file system of {folder} has no locks ({error.strerror}); give a"
                " folder on another one"
            ) from None
        if _is_unused(folder, identity, prepared):
            _clear(folder)
        _same_job(folder, identity, flag)
        try:
            yield folder
        except DamagedStateError as error:
            raise ValueError(f"{flag}: {error}; remove {folder} to begin anew") from None


def publish(folder: Path, out: Path, only_to_resume: Sequence[str]) -> None:
    """Give the folder of a job its name, and remove from it what only a job that resumes needs.
    In this order, a job that is stopped at any moment resumes, or is done; in the moment between,
    some of those files stay in the result, where they do no harm.

    Args:
        folder: with all that the job has made.
        out: the name.
        only_to_resume: names or patterns of files and folders, beside those of this module.

    Raises:
        OSError: the disk is full, or ``out`` holds something.
    """
    atomic.publish(folder, out)
    for pattern in (*only_to_resume, JOB_NAME, LOCK_NAME):
        for entry in out.glob(pattern):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):  # the result is complete with it, too
                    entry.unlink()


def _same_job(folder: Path, identity: dict[str, Any], flag: str) -> None:
    """Write which job works in a folder, or check that it is this one.

    Raises:
        FileExistsError: the folder holds something else, or another job's work.
    """
    path = folder / JOB_NAME
    before = atomic.read_json(path)
    if before is None:
        if path.exists():  # a power cut left it empty: nothing says which job's files these are
            _clear(folder)
        strangers = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.name != LOCK_NAME and not atomic.is_partial(entry)
        )
        if strangers:
            raise FileExistsError(
                f"{flag}: {folder} holds something else ({', '.join(strangers[:3])}); remove it"
                " first"
            )
        atomic.write_text(path, json.dumps(identity, indent=2, ensure_ascii=True))
        return
    there = dict(_leaves(before))
    _refuse_changed_files(folder, there, identity, flag)
    asked = dict(_leaves(identity))
    differences = [
        f"{name}: {there.get(name)!r:.200} there, {asked.get(name)!r:.200} requested"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    ]
    if differences:
        shown = differences[:SHOWN_DIFFERENCES]
        more = (
            f"; and {len(differences) - len(shown)} more" if len(differences) > len(shown) else ""
        )
        raise FileExistsError(
            f"{flag}: {folder} was left by another job ({'; '.join(shown)}{more}); "
            "give the same settings to resume it, or remove it"
        )


def _is_unused(folder: Path, identity: dict[str, Any], prepared: Sequence[str]) -> bool:
    """Tell whether another job was refused in a folder before it had done anything, such as one
    whose template the tokenizer does not fit.

    Args:
        folder: of the work.
        identity: of this job.
        prepared: as of ``partial_folder``.
    """
    before = atomic.read_json(folder / JOB_NAME)
    if before is None or before == identity:
        return False
    early = {JOB_NAME, LOCK_NAME, *prepared}
    return all(entry.name in early or atomic.is_partial(entry) for entry in folder.iterdir())


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the single values of JSON with their places, such as ``sources[0].root``."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _leaves(inside, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inside in enumerate(value):
            yield from _leaves(inside, f"{name}[{index}]")
    else:
        yield name, value


def _refuse_changed_files(
    folder: Path, there: dict[str, Any], identity: dict[str, Any], flag: str
) -> None:
    """Raise FileExistsError if an annotation file is not what it was when the job began.

    Args:
        folder: of the work.
        there: the values of the job that was begun, as of ``_leaves``.
        identity: of this job.
        flag: as of ``partial_folder``.
    """
    for number, source in enumerate(identity.get("sources") or ()):
        before = [there.get(f"sources[{number}].{name}") for name in ("path", "bytes", "modified")]
        now = [source["path"], source["bytes"], source["modified"]]
        if before[0] == now[0] and before != now:
            raise FileExistsError(
                f"{flag}: {source['path']} has changed since this job began; remove {folder} to"
                " begin anew"
            )


def _clear(folder: Path) -> None:
    """Remove everything but the lock, which this process holds."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in (LOCK_NAME, JOB_NAME):
            entry.unlink()
    (folder / JOB_NAME).unlink()  # last, so that an interrupted removal is taken up again
