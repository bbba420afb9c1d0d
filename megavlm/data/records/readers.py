"""The table of annotation formats, and the way from the name of an annotation file, a pattern or a
folder to the files.

A new format is a row here and a file with its ``Reader``.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megavlm.data.records.energon import expand_braces, read_dataset
from megavlm.data.records.json_reader import open_json
from megavlm.data.records.parquet_reader import ParquetFile
from megavlm.data.records.raw_record import Reader
from megavlm.data.records.reject import printable
from megavlm.data.records.tar_reader import open_archive
from megavlm.io import remote
from megavlm.io.remote import is_remote

# Readers that a process keeps: of those that hold a file open, and of those that hold its path. The
# packs take records from all files, so that one which is not kept is made again for nearly every
# record; of JSON that takes a look at the first megabyte.
OPEN_FILES = 64
KEPT_READERS = 2**16
# What an imagefolder of Hugging Face's datasets calls its annotations.
FOLDER_FILES = ("metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table.

    Args:
        name: of the format, for messages.
        endings: of its files, in lower case.
        open: makes a reader of a path; raises ValueError if the content is something else.
        is_walked: whether its records are found by going from one to the next, which takes long.
        stays_open: whether a reader holds its file open.
    """

    name: str
    endings: tuple[str, ...]
    open: Callable[[str], Reader]
    is_walked: bool = False
    stays_open: bool = False


FORMATS = (
    Format(name="JSON", endings=(".jsonl", ".json", ".ndjson", ".jsonlines"), open=open_json),
    Format(name="parquet", endings=(".parquet", ".pq"), open=ParquetFile, stays_open=True),
    Format(name="WebDataset or Energon", endings=(".tar",), open=open_archive, is_walked=True),
)
# Commands that unpack, by ending.
COMPRESSED = {
    ".gz": "gunzip < {} > plain",
    ".tgz": "gunzip < {} > plain.tar",
    ".bz2": "bunzip2 < {} > plain",
    ".xz": "xz -dc {} > plain",
    ".zst": "zstd -dc {} > plain",
    ".zip": "unzip {}",
}


def find_format(path: str) -> Format:
    """Return the format of a file by its ending, in upper or lower case.

    Raises:
        ValueError: no format has the ending; lists those that exist, or says how to unpack it.
    """
    # What stands behind a question mark is not part of the file's name on the web.
    name = (path.partition("?")[0] if path.startswith("http") else path).lower()
    for ending, command in COMPRESSED.items():
        if name.endswith(ending):
            raise ValueError(
                f"annotation {path}: compressed, so that no record can be read by its offset;"
                f" unpack it first: {command.format(path)}"
            )
    for row in FORMATS:
        if name.endswith(row.endings):
            return row
    known = ", ".join(ending for row in FORMATS for ending in row.endings)
    raise ValueError(f"annotation {path}: no format has this ending; the endings are {known}")


def open_reader(path: str) -> Reader:
    """Open an annotation file, or return the reader that opened it before.

    Raises:
        ValueError: the file is not what its ending says.
    """
    return (_open_file if find_format(path).stays_open else _look_into)(path)


def _open(path: str) -> Reader:
    return find_format(path).open(path)


_open_file = lru_cache(maxsize=OPEN_FILES)(_open)
_look_into = lru_cache(maxsize=KEPT_READERS)(_open)


def find_files(annotation: str) -> list[str]:
    """Return the annotation files that a name means: one file, a pattern (``*``, ``?``, ``[0-9]``,
    ``{000..127}``, ``{a,b}``), an Energon dataset, or an imagefolder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file or folder of a kind that is not read.
    """
    if (Path(annotation) / ".nv-meta").is_dir():
        names = list(read_dataset(annotation).shards)
    elif Path(annotation).is_dir():
        names = [str(Path(annotation) / name) for name in FOLDER_FILES]
        names = [name for name in names if Path(name).is_file()][:1]
        if not names:
            raise ValueError(
                f"annotation {annotation}: a folder without .nv-meta, so no Energon dataset, and"
                f" without {' or '.join(FOLDER_FILES)}; give a file or a pattern such as *.tar"
            )
    else:
        names = [name for pattern in expand_braces(annotation) for name in _matches(pattern)]
    missing = [name for name in names if not remote.exists(name)]
    if missing or not names:
        raise FileNotFoundError(
            f"annotation {missing[0] if missing else annotation}: there is no such file"
        )
    for name in names:
        if Path(name).is_dir():
            raise ValueError(f"annotation {name}: a folder; give a file or a pattern such as *.tar")
        if not is_remote(name) and not Path(name).is_file():
            raise ValueError(
                f"annotation {name}: a pipe or a device, but records are read twice; give a file"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"annotation {printable(name)}: a name that is not UTF-8; rename it"
            ) from None
        find_format(name)
    return names


def is_annotation(name: str) -> bool:
    """Return whether a name means annotations, and not a folder of packs: a file, a pattern, an
    Energon dataset or an imagefolder.
    """
    if is_remote(name):
        return (
            name.partition("?")[0]
            .lower()
            .endswith(tuple(ending for row in FORMATS for ending in row.endings))
        )
    path = Path(name)
    if path.is_dir():
        return not (path / "manifest.json").exists() and (
            (path / ".nv-meta").is_dir() or any((path / each).is_file() for each in FOLDER_FILES)
        )
    return bool(name) and (path.is_file() or glob.has_magic(name) or "{" in name)


def media_root(annotation: str, root: str) -> str:
    """Return the folder that a source's paths are relative to: that of an imagefolder is its
    own, unless another is given.
    """
    path = Path(annotation)
    if not root and path.is_dir() and not (path / ".nv-meta").is_dir():
        return annotation
    return root


def _matches(pattern: str) -> list[str]:
    """Return the files that a pattern matches; a name without magic, or of a file that exists, is
    itself.
    """
    if is_remote(pattern):
        is_one = pattern.startswith("http") or not glob.has_magic(pattern)
        return [pattern] if is_one else remote.find(pattern)
    return (
        sorted(glob.glob(pattern))
        if glob.has_magic(pattern) and not Path(pattern).exists()
        else [pattern]
    )
