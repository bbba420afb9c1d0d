"""The files of a folder, read in pieces: of a local folder, or of object storage through fsspec."""

from __future__ import annotations

import os
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from megavlm.io.remote import facts_of, is_remote, open_system, read_range, request

# A process may commonly open 1024 files, and workers inherit those of their parent.
OPEN_FILES = 64


class LocalFiles:
    """The files of a local folder. Reads name their offset, so that processes and threads may share
    open files.

    Args:
        folder: that holds the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of a file; fewer where it ends before."""
        with self._lock:
            descriptor = self._descriptor(name)
            data = os.pread(descriptor, end - start, start)
            while len(data) < end - start:  # one call gives 2 GB at most
                more = os.pread(descriptor, end - start - len(data), start + len(data))
                if not more:
                    break
                data += more
        return data

    def copy(self, name: str, to: Path) -> None:
        """Copy a file, or a folder with all that is in it; nothing where there is none."""
        source = self.folder / name
        if source.is_dir():
            shutil.copytree(source, to)
        elif source.exists():
            shutil.copyfile(source, to)

    def _descriptor(self, name: str) -> int:
        """Return an open file; those read last stay open."""
        if name not in self._open:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = os.open(self.folder / name, os.O_RDONLY)
        self._open.move_to_end(name)
        return self._open[name]


class RemoteFiles:
    """The files under a URL that fsspec knows, such as ``s3://bucket/packs``.

    Args:
        folder: the URL.

    Raises:
        ValueError: fsspec does not know such URLs, or lacks the package for them.

    Reads raise RemoteError if the store does not answer.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self._system, self._root = open_system(self.folder)

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
        path = f"{self._root}/{name}"
        url = f"{self.folder}/{name}"
        return request(url, lambda: read_range(url, self._system, path, start, end))

    def copy(self, name: str, to: Path) -> None:
        """Copy a file, or a folder with all that is in it; nothing where there is none."""
        source = f"{self._root}/{name}"
        facts = self._facts(name)
        if facts is None:
            return
        if facts["type"] == "directory":
            request(self.folder, lambda: self._system.get(source + "/", f"{to}/", recursive=True))
        else:
            request(self.folder, lambda: self._system.get_file(source, str(to)))

    def _facts(self, name: str) -> dict[str, Any] | None:
        return facts_of(f"{self.folder}/{name}", self._system, f"{self._root}/{name}")


Files = LocalFiles | RemoteFiles


def open_folder(folder: str | Path) -> Files:
    """Open a local or remote folder of packs.

    Raises:
        ValueError: its files cannot be listed, or fsspec does not know such URLs.
    """
    if str(folder).startswith(("http://", "https://")):
        raise ValueError(
            f"{folder}: packs cannot be read from the web, where the files of their tokenizer"
            " cannot be listed; copy them to a disk or to a store such as S3"
        )
    return RemoteFiles(str(folder)) if is_remote(folder) else LocalFiles(folder)
