"""Open files that folders of packs share, so that a run over a thousand datasets does not ask for
more than a process may have open.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

# A process may commonly open 1024 files; so many are left to sockets, libraries and pipes.
_LEFT = 768
_LEAST = 64
_MOST = 4096


class OpenFiles:
    """The files that were read last; others are closed. Reads name their offset, so that processes
    and threads may share open files. A copy that is unpickled elsewhere opens them again.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of a file; fewer where it ends before.

        Raises:
            OSError: it cannot be read, not even if it is opened again; names the file.
        """
        with self._lock:
            try:
                return _read(self._descriptor(path), start, end)
            except OSError:  # a server of NFS forgets open files, and disks fail once
                if (descriptor := self._open.pop(path, None)) is not None:
                    os.close(descriptor)
            try:
                return _read(self._descriptor(path), start, end)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error

    def _descriptor(self, path: Path) -> int:
        """Return an open file; those read last stay open."""
        if path not in self._open:
            while len(self._open) >= most_open():
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]


def most_open() -> int:
    """Return how many files stay open: what this process may open, less what others need."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(max(_LEAST, soft - _LEFT), _MOST)


def allow_many() -> None:
    """Let this process, and those that it starts, open as many files as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read(descriptor: int, start: int, end: int) -> bytes:
    """Read bytes ``[start, end)`` of an open file; fewer where it ends before."""
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start:  # one call gives 2 GB at most
        more = os.pread(descriptor, end - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
