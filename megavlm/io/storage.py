"""The files of a folder, read in pieces: of a local folder, or of object storage through fsspec."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megavlm.io.open_files import OpenFiles
from megavlm.io.remote import facts_of, is_remote, open_system, read_range, request


def file_states(folder: Path) -> dict[str, list[int]]:
    """Return size and time of each file below a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): size_and_time(path) for path in files}


def size_and_time(path: Path) -> list[int]:
    """Return what tells whether a local file has changed, as JSON."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


class LocalFiles:
    """The files of a local folder.

    Args:
        folder: that holds the files.
        opened: open files of this and other folders; none: of this one alone.
    """

    def __init__(self, folder: str | Path, opened: OpenFiles | None = None) -> None:
        self.folder = Path(folder)
        self.opened = opened or OpenFiles()

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.opened)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of a file; fewer where it ends before. Raises OSError."""
        return self.opened.read(self.folder / name, start, end)

    def copy(self, name: str, to: Path) -> None:
        """Copy a file, or a folder with all that is in it; nothing where there is none."""
        source = self.folder / name
        if source.is_dir():
            shutil.copytree(source, to)
        elif source.exists():
            shutil.copyfile(source, to)


class RemoteFiles:
    """The files under a URL that fsspec knows, such as ``s3://bucket/packs``.

    Args:
        folder: the URL.

    Raises:
        ValueError: fsspec does not know such URLs, or lacks the package for them.

    Reads raise RemoteError if the store does not answer.

    Each process opens the store for itself: clients have a thread, which a fork leaves behind, and
    fsspec refuses to use one of another process.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self._opened = open_system(self.folder)
        self._process = os.getpid()

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        facts = self._facts(name)
        return facts is not None and facts["type"] == "file"

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        facts = self._facts(name)
        if facts is None:
            raise FileNotFoundError(f"{self.folder}/{name}: there is no such file")
        return facts["size"]

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of a file; fewer where it ends before."""
        if end <= start:
            return b""
        system, path = self._place(name)
        url = f"{self.folder}/{name}"
        return request(url, lambda: read_range(url, system, path, start, end))

    def copy(self, name: str, to: Path) -> None:
        """Copy a file, or a folder with all that is in it; nothing where there is none."""
        system, source = self._place(name)
        facts = self._facts(name)
        if facts is None:
            return
        if facts["type"] == "directory":
            request(self.folder, lambda: system.get(source + "/", f"{to}/", recursive=True))
        else:
            request(self.folder, lambda: system.get_file(source, str(to)))

    def _facts(self, name: str) -> dict[str, Any] | None:
        return facts_of(f"{self.folder}/{name}", *self._place(name))

    def _place(self, name: str) -> tuple[Any, str]:
        """Return the file system of this process, and the path of a file in it."""
        if self._process != os.getpid():
            self._opened = open_system(self.folder)
            self._process = os.getpid()
        system, root = self._opened
        return system, f"{root}/{name}"


Files = LocalFiles | RemoteFiles


class ReadError(ValueError):
    """Stored data that cannot be read any more, or that is not what was written."""


def open_folder(folder: str | Path, opened: OpenFiles | None = None) -> Files:
    """Open a local or remote folder of packs.

    Args:
        folder: the folder.
        opened: open files that it shares with other local folders; none: it has its own.

    Raises:
        ValueError: its files cannot be listed, or fsspec does not know such URLs.
    """
    if str(folder).startswith(("http://", "https://")):
        raise ValueError(
            f"{folder}: packs cannot be read from the web, where the files of their tokenizer"
            " cannot be listed; copy them to a disk or to a store such as S3"
        )
    return RemoteFiles(str(folder)) if is_remote(folder) else LocalFiles(folder, opened)
