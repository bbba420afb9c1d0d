"""Folders of models that are named by their hub ids, in the local cache of the hub. Nothing is
downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cached(name: str) -> str:
    """Return the folder of the cached snapshot if ``name`` is the hub id of a model that the cache
    holds; else ``name``, such as that of a folder.
    """
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        return name
    # Only now: the import takes a while, and hardly any command line needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return name


def find_folder(name: str, flag: str = "") -> Path:
    """Return the folder ``name``, or the cached snapshot of the hub id ``name``; ``flag`` goes
    before the name in errors.

    Raises:
        FileNotFoundError: no such folder exists, and the cache has no such model.
    """
    folder = Path(cached(name))
    if folder.exists():
        return folder
    as_id = (
        f", and the hub's cache has no such model; if it is one, download it first: hf download"
        f" {name}"
    )
    told = f"{flag} {name}".lstrip()
    raise FileNotFoundError(f"{told}: no such folder{as_id if _HUB_ID.fullmatch(name) else ''}")


def is_same(noted: str, name: str) -> bool:
    """Tell whether ``name`` is what was noted, or its hub id if that was a cached snapshot: what
    ``cached`` makes of it while the cache holds the model.
    """
    return noted == name or (bool(name) and _repository(Path(noted)) == name)


def file_name(folder: str | Path) -> str:
    """Return a name for files about the model in a folder."""
    folder = Path(folder)
    return (_repository(folder) or folder.resolve().name).replace("/", "--")


def short_name(folder: str | Path) -> str:
    """Return what to call a folder of a model: its last part, or the hub id and the commit of a
    cached snapshot.
    """
    folder = Path(folder)
    repository = _repository(folder)
    return f"{repository} at {folder.name}" if repository else folder.resolve().name


def _repository(folder: Path) -> str:
    """Return the hub id of a cached snapshot; empty: it is none."""
    name = folder.parent.parent.name
    is_snapshot = folder.parent.name == "snapshots" and name.startswith("models--")
    return name.removeprefix("models--").replace("--", "/") if is_snapshot else ""
