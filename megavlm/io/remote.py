"""Read files by URL, such as ``s3://bucket/data.tar``, through fsspec.

Each request that fails is made again after a growing pause, and its answer must have as many bytes
as were asked for. That is the only policy: clients' own attempts are switched off, and their
timeouts are set unless fsspec's configuration sets them.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megavlm.io.progress import Progress

Answer = TypeVar("Answer")

ATTEMPTS = 5
PAUSE_SECONDS = 0.5  # doubles after each attempt
CONNECT_SECONDS = 10
READ_SECONDS = 30
# What is read ahead: enough for the headers of an image, and for some records of an archive.
BUFFER_BYTES = 2**16
COPY_BYTES = 2**24


def is_remote(path: str | Path) -> bool:
    """Return whether a file or folder is named by a URL."""
    return "://" in str(path)


class RemoteError(OSError):
    """A store did not answer, however often it was asked."""


class WholeFilesError(RemoteError):
    """A web server sends whole files, whatever part is asked for."""


# Nothing that is asked again would change these.
FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    WholeFilesError,
)


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What tells whether a file has changed.

    Args:
        size: in bytes.
        version: time of its last change in nanoseconds, or what the store calls its version.
    """

    size: int
    version: int | str


def file_state(path: str) -> FileState:
    """Return the state of a file, or of one behind a URL.

    Raises:
        FileNotFoundError: there is none.
        RemoteError: the store does not answer, or does not tell the size.
    """
    if not is_remote(path):
        found = os.stat(path)
        return FileState(size=found.st_size, version=found.st_mtime_ns)
    return _remote_state(path)


def exists(path: str) -> bool:
    """Return whether there is a file, or one behind a URL."""
    if not is_remote(path):
        return Path(path).exists()
    system, inside = open_system(path)
    return facts_of(path, system, inside) is not None


def find(pattern: str) -> list[str]:
    """Return the URLs that a pattern matches, sorted."""
    system, inside = open_system(pattern)
    names = request(pattern, lambda: system.glob(inside))
    return sorted(system.unstrip_protocol(name) for name in names)


def open_file(path: str, buffer: int = BUFFER_BYTES) -> BinaryIO:
    """Open a file, or one behind a URL, for reading.

    Raises:
        FileNotFoundError: there is none.
        RemoteError: the store does not answer.
        ValueError: fsspec does not know such URLs, or lacks the package for them.
    """
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(_RemoteReader(path), buffer)


def local_copy(url: str) -> str:
    """Return the path of a copy of a file in this machine's folder for temporary files; it is made
    once for each state of the file.

    Raises:
        OSError: as ``open_file``; or there is no room.
    """
    state = file_state(url)
    name = hashlib.sha256(f"{url} {state.size} {state.version}".encode()).hexdigest()[:32]
    path = Path(tempfile.gettempdir()) / f"megavlm-{os.getuid()}" / name
    if path.exists() and path.stat().st_size == state.size:
        return str(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    growing = path.with_name(f"{name}.{os.getpid()}")
    try:
        with (
            open_file(url) as source,
            open(growing, "wb") as target,
            Progress(f"copying {url}", "B", state.size) as progress,
        ):
            while chunk := source.read(COPY_BYTES):
                target.write(chunk)
                progress.add(len(chunk))
        growing.replace(path)
    finally:
        growing.unlink(missing_ok=True)
    return str(path)


def request(url: str, ask: Callable[[], Answer]) -> Answer:
    """Return what ``ask`` returns, after some attempts if need be.

    Raises:
        RemoteError: every attempt failed.
        OSError: a kind of failure that no other attempt changes.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except FINAL:
            raise
        except Exception as error:  # clients have exceptions of their own
            last = f"{type(error).__name__}: {error}"
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise RemoteError(f"{url}: no answer after {ATTEMPTS} attempts ({last:.300})")


def facts_of(url: str, system: Any, path: str) -> dict[str, Any] | None:
    """Return what a file system tells of a file or folder; none: there is no such one.

    Its own ``exists`` and ``isfile`` also say no if the store does not answer.

    Raises:
        RemoteError: the store does not answer.
    """

    def ask() -> dict[str, Any]:
        try:
            return system.info(path)
        except FileNotFoundError as error:
            # fsspec's file system of the web says so of every failure, and has the reason behind.
            cause = error.__cause__
            if cause is None or isinstance(cause, FileNotFoundError):
                raise
            if vars(cause).get("status") in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                raise
            raise cause from None

    try:
        return request(url, ask)
    except FileNotFoundError:
        return None


def read_range(url: str, system: Any, path: str, start: int, end: int) -> bytes:
    """Return the bytes ``[start, end)`` of a file with one request; fewer if it ends before.

    Raises:
        WholeFilesError: the server does not know ranges, and the part is not the file's first.
    """
    data = system.cat_file(path, start=start, end=end)
    if len(data) > end - start:
        if start:
            raise WholeFilesError(
                f"{url}: its server sends the whole file ({len(data):,} bytes), whatever part of it"
                " is asked for; copy the files to a disk, or serve them with ranges"
            )
        return data[:end]
    return data


class _RemoteReader(io.RawIOBase):
    """The bytes behind a URL, read in ranges."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._system, self._path = open_system(url)
        self._size = _remote_state(url).size
        self._at = 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that a position can be chosen."""
        return True

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Choose the position of the next byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return how many bytes there were."""
        data = self._range(min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read the rest, with one request."""
        return self._range(self._size)

    def _range(self, end: int) -> bytes:
        start = self._at
        if start >= end:
            return b""

        def ask() -> bytes:
            data = read_range(self._url, self._system, self._path, start, end)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came, and {end - start} were asked for")
            return data

        data = request(self._url, ask)
        self._at = end
        return data


@lru_cache(maxsize=4096)
def _remote_state(url: str) -> FileState:
    system, path = open_system(url)
    facts = facts_of(url, system, path)
    if facts is None:
        raise FileNotFoundError(f"{url}: there is no such file")
    if facts.get("size") is None:
        raise RemoteError(f"{url}: the store does not tell the size of the file")
    known = (
        "ETag",
        "etag",
        "LastModified",
        "Last-Modified",
        "last_modified",
        "mtime",
        "updated",
        "created",
    )
    version = next((str(facts[key]) for key in known if facts.get(key)), "")
    return FileState(size=int(facts["size"]), version=version)


def open_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        ValueError: fsspec does not know such URLs, or lacks the package for them.
    """
    try:
        import fsspec

        _set_timeouts(url.partition("://")[0])
        system, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{url:.200}: cannot be read: {error}; pip install 'megavlm[remote]', for gs://"
            " 'megavlm[gcs]', or the package for such URLs"
        ) from None
    if url.startswith(("s3://", "s3a://")):
        system.retries = 1
    elif url.startswith(("gs://", "gcs://")):
        # Its class has the number of attempts inside of this function.
        system._request = partial(type(system)._request.__wrapped__, system)
    return system, path


@lru_cache
def _set_timeouts(protocol: str) -> None:
    """Set timeouts for a protocol, if fsspec's configuration sets none."""
    from fsspec.config import conf

    if protocol in ("s3", "s3a"):
        given = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        once = {"retries": {"max_attempts": 0}}
        conf.setdefault(protocol, {}).setdefault("config_kwargs", given | once)
    elif protocol in ("http", "https", "gs", "gcs"):
        import aiohttp

        limit = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        )
        if protocol in ("gs", "gcs"):
            conf.setdefault(protocol, {}).setdefault("requests_timeout", limit)
            # Has attempts of its own, and asks each bucket for its kind first.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        else:
            conf.setdefault(protocol, {}).setdefault("client_kwargs", {"timeout": limit})
