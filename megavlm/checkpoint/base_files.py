"""The files of the base weights of a checkpoint of trained parameters: where they are, and their
content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.checkpoint import checksums
from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.io.checksum import Sum

_UNREAD = -1
"""Stands for the checksum of a file of which the run noted the size alone."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a checkpoint of trained parameters notes of its base weights; nothing if the run began
    with fresh weights.

    Args:
        folders: absolute, one for each part that the run began with.
        beside: the same folders, from the run's save folder.
        files: number of the folder and path in it, size and CRC-32 of each file of weights.
    """

    folders: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    files: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def read(cls, values: Any) -> Base:
        """Take what ``state.json`` holds; earlier versions had a text."""
        if not isinstance(values, Mapping):
            named = str(values or "").rpartition(" ")[0]
            return cls(folders=(named,) if named else ())
        return cls(
            folders=tuple(values["folders"]),
            beside=tuple(values["beside"]),
            files=tuple((str(name), int(size), int(crc)) for name, size, crc in values["files"]),
        )


def weight_files(folder: Path) -> list[str]:
    """Return the files of weights in a folder of a checkpoint's step or of Hugging Face."""
    suffixes = (".safetensors", ".bin", ".distcp")
    found = [path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in found)


def note(folders: list[Path], save: Path, *, by_size_only: bool) -> Base:
    """Note the files of weights in folders. Collective: each rank reads a share of what has no
    checksums.

    Args:
        folders: of the parts, in order.
        save: the run's save folder.
        by_size_only: note sizes instead of contents.

    Raises:
        RankError: a file cannot be read; every rank raises it.
    """
    known = [_written_sums(folder) for folder in folders]
    named = [
        (number, name) for number, folder in enumerate(folders) for name in weight_files(folder)
    ]
    unread = [(number, name) for number, name in named if name not in known[number]]
    mine: dict[tuple[int, str], Sum] = {}
    with raised_on_all():
        for number, name in unread[dist.get_rank() :: dist.get_world_size()]:
            path = folders[number] / name
            mine[number, name] = (
                (path.stat().st_size, _UNREAD) if by_size_only else checksums.measure(path)
            )
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    read = {key: value for share in shares for key, value in share.items()}
    sums = {key: read.get(key) or known[key[0]][key[1]] for key in named}
    files = tuple((f"{number}/{name}", *sums[number, name]) for number, name in named)
    return moved(Base(files=files), folders, save)


def moved(base: Base, folders: list[Path], save: Path) -> Base:
    """Return the same files at other folders."""
    return replace(
        base,
        folders=tuple(str(folder.resolve()) for folder in folders),
        beside=tuple(os.path.relpath(folder.resolve(), save.resolve()) for folder in folders),
    )


def _written_sums(folder: Path) -> dict[str, Sum]:
    try:
        return checksums.read(folder) or {}
    except (ValueError, OSError):
        return {}


def difference(base: Base, folders: list[Path]) -> str:
    """Return why folders do not hold the files of a base, without reading these; empty if nothing
    speaks against it.
    """
    if len(folders) != len(base.folders):
        return f"{len(folders)} folders, and the run began with {len(base.folders)}"
    known = {folder: _written_sums(folder) for folder in folders}
    for folder, name, size, crc in _entries(base, folders):
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if (there := path.stat().st_size) != size:
            return f"{path}: {there:,} bytes, it had {size:,}"
        written = known[folder].get(name)
        if written and crc != _UNREAD and written[1] != crc:
            return f"{path}: of another content (by its {checksums.FILE_NAME})"
    return ""


def damage(base: Base, folders: list[Path], *, by_size_only: bool) -> list[str]:
    """Find what is wrong with the files of a base. Collective: each rank reads a share of them.

    Args:
        base: what they were.
        folders: where they are.
        by_size_only: compare sizes instead of contents.
    """
    found: list[str] = []
    own = list(_entries(base, folders))[dist.get_rank() :: dist.get_world_size()]
    for folder, name, size, crc in own:
        only = by_size_only or crc == _UNREAD
        found += checksums.differences(folder, {name: (size, crc)}, [name], by_size_only=only)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    return [line for share in shares for line in share]


def _entries(base: Base, folders: list[Path]) -> Iterator[tuple[Path, str, int, int]]:
    for entry, size, crc in base.files:
        number, _, name = entry.partition("/")
        yield folders[int(number)], name, size, crc
