"""Find folders of models by their hub ids in the local cache of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_folder(name: str, flag: str) -> Path:
    """Return the folder ``name``, or the cached snapshot of the hub id ``name``; download nothing.

    Raises:
        FileNotFoundError: no such folder exists, and the cache has no such model.
    """
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{flag} {name}: no such folder, and the hub's cache has no such model; download it"
            f" first: hf download {name}"
        ) from None
