"""From the name of an annotation file, a pattern or a folder to the files that can be read."""

from __future__ import annotations

import glob
from functools import lru_cache
from pathlib import Path

from megavlm.data.records.json_reader import JsonLines, JsonList, is_list
from megavlm.data.records.parquet_reader import ParquetFile
from megavlm.data.records.raw_record import EntryFile
from megavlm.data.records.tar_reader import ArchiveFile, FieldMap, energon_files, expand

OPEN_FILES = 64
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


def find_files(annotation: str) -> list[str]:
    """The annotation files that a name means: one file, a pattern (``*``, ``?``, ``[0-9]``,
    ``{000..127}``), or an Energon dataset.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file or folder of a kind that is not read.
    """
    if (Path(annotation) / ".nv-meta").is_dir():
        names = energon_files(Path(annotation))[0]
    else:
        names = [name for pattern in expand(annotation) for name in _matches(pattern)]
    missing = [name for name in names if not Path(name).exists()]
    if missing or not names:
        raise FileNotFoundError(
            f"annotation {missing[0] if missing else annotation}: there is no such file"
        )
    for name in names:
        if Path(name).is_dir():
            raise ValueError(
                f"annotation {name}: a folder without .nv-meta, so no Energon dataset; give a file"
                " or a pattern such as *.tar"
            )
        if name.endswith(COMPRESSED):
            raise ValueError(
                f"annotation {name}: compressed, so that no record can be read by its place; unpack"
                " it first"
            )
    return names


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches; a name without magic, or of a file that is there, is
    itself.
    """
    return (
        sorted(glob.glob(pattern))
        if glob.has_magic(pattern) and not Path(pattern).exists()
        else [pattern]
    )


@lru_cache(maxsize=OPEN_FILES)
def open_entries(path: str) -> EntryFile:
    """The entries of an annotation file, by its ending: .parquet, .tar, .json, or lines of JSON.

    Raises:
        ValueError: the file is not what its ending says.
    """
    if path.endswith(".parquet"):
        return ParquetFile(path)
    if path.endswith(".tar"):
        return ArchiveFile(path, _field_map(str(_energon_folder(path))))
    if path.endswith(".json") and is_list(Path(path)):
        return JsonList(path)
    return JsonLines(path)


def _energon_folder(path: str) -> Path:
    """The nearest folder above an archive that describes it, or the archive's own."""
    return next(
        (folder for folder in Path(path).parents if (folder / ".nv-meta").is_dir()),
        Path(path).parent,
    )


@lru_cache(maxsize=OPEN_FILES)
def _field_map(folder: str) -> FieldMap | None:
    """What an Energon dataset says that its files mean."""
    return energon_files(Path(folder))[1] if (Path(folder) / ".nv-meta").is_dir() else None
