"""Files and folders that appear whole or not at all, even if the power fails.

Each is written under a temporary name, flushed to the disk, and renamed; then the folder that holds
the name is flushed. Without the first flush a file system may store the rename before the bytes,
and after a power cut an empty file stands under the final name. ``read_json`` therefore treats an
empty or cut file as an absent one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_PARTIAL = ".partial"
_GROWING = ".growing_"


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, in UTF-8; a reader sees the old file or all of the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step; a reader sees the old file or all of the new one.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    temporary = path.with_name(f".{path.name}{_PARTIAL}")
    with open(temporary, "wb") as file:
        file.write(content)
        sync_file(file)
    os.replace(temporary, path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object of a state file; None if the file is absent, empty or cut off. Of other
    JSON, which no crash leaves there, it is empty.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not JSON, or not UTF-8
        return None
    return content if isinstance(content, dict) else {}


def is_partial(path: Path) -> bool:
    """Return whether a file is one that ``write_bytes`` did not finish."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def sync_file(file: IO) -> None:
    """Wait until the bytes of an open file are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(growing: Path, target: Path) -> None:
    """Flush a complete folder with all that is in it, and give it its name.

    Args:
        growing: folder under a temporary name, beside ``target``.
        target: the name; missing, or an empty folder.

    Raises:
        OSError: the disk is full, or ``target`` holds something.
    """
    sync_tree(growing)
    rename(growing, target)


def rename(flushed: Path, target: Path) -> None:
    """Give a folder whose content is on the disk its name; arguments and errors as of
    ``publish``.
    """
    os.replace(flushed, target)
    _sync(target.parent)


def sync_tree(root: Path, flushed: Collection[str] = ()) -> None:
    """Wait until a folder and all that is in it are on the disk.

    Args:
        root: the folder.
        flushed: files that are, by their paths from it; whoever wrote them has waited.
    """
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if str(path.relative_to(root)) not in flushed:
                _sync(path)
        _sync(Path(folder))


def make_folder(folder: Path, asked: str) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: the folder.
        asked: flag and value that it is made for, in errors.

    Raises:
        OSError: it cannot be made; the message names what was asked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{asked}: nothing can be written there ({error})") from error


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{_GROWING}{target.name}.lock")


def remove_lock(target: Path) -> None:
    """Remove the lock that a process left if it was killed right after it had named a folder."""
    _lock_of(target).unlink(missing_ok=True)


@contextmanager
def _alone(target: Path, flag: str) -> Iterator[None]:
    """Keep other processes from making the same folder meanwhile, where the file system has locks;
    one ends with its process.
    """
    path = _lock_of(target)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{flag} {target}: another process is writing it; wait for it, or name another"
                " folder"
            ) from None
        except OSError:  # no locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, flag: str) -> Iterator[Path]:
    """Yield a folder to fill, which takes the name ``target`` when the block ends well and is
    removed otherwise. What a killed process left of it is removed first.

    Args:
        target: the folder to make; missing or empty.
        flag: names ``target`` in errors.

    Raises:
        ValueError: the target exists and is not an empty folder, or another process makes it.
        OSError: nothing can be written there.
    """
    make_folder(target.parent, f"{flag} {target}")
    with _alone(target, flag):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(
                f"{flag} {target}: exists and is not an empty folder; name another one"
            )
        growing = target.with_name(f"{_GROWING}{target.name}")
        shutil.rmtree(growing, ignore_errors=True)
        make_folder(growing, f"{flag} {target}")
        try:
            yield growing
            publish(growing, target)
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
