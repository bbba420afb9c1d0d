"""The meta file, which lists the sources of a dataset: where they are, how often they are taken,
and what is left out of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.config.tiling import MOST_TILES
from megavlm.data.records.filters import (
    Filter,
    is_number,
    parse_filter,
    read_filter,
    refuse_unknown,
)
from megavlm.data.records.readers import find_files, media_root
from megavlm.data.records.reject import RejectError
from megavlm.io.remote import is_remote, open_file

# Rows of the scan hold difficulties as floats of 32 bits.
MOST_DIFFICULT = 3.4e38
META_KEYS = (
    "root",
    "annotation",
    "data_augment",
    "repeat_time",
    "weight",
    "length",
    "max_dynamic_patch",
    "prompt",
    "difficulty",
    "filter",
)


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """One annotation file and how to take it. The files of one entry of a meta file share its name,
    and all but the path.

    Args:
        name: of the source, for reports.
        path: the file.
        root: folder that image paths are relative to, and must stay inside; empty: paths are taken
            as they are.
        repeat_time: how often each record is taken. Below 1, the first share of the records,
            rounded down, as in InternVL; of 2.5, each record twice, and a half of them, drawn by
            the seed, once more.
        weight: share of the samples in the dataset that have this name, compared with others';
            None: what ``repeat_time`` makes.
        max_tiles: most tiles of an image of this source; None: the packer's setting.
        augment: whether images may be changed at random while training.
        prompt: what the human turn of a caption says behind the image.
        difficulty: name of the records' field that holds it as a number, or the difficulty of all
            of them; None: there is none.
        keep: what records must be like.
        length: how many records the source's files have together; None: not known.
    """

    name: str
    path: str
    root: str = ""
    repeat_time: float = 1.0
    weight: float | None = None
    max_tiles: int | None = None
    augment: bool = False
    prompt: str = ""
    difficulty: str | float | None = None
    keep: Filter = field(default_factory=Filter)
    length: int | None = None

    def difficulty_of(self, record: Mapping[str, Any]) -> float:
        """How difficult a record is; raises RejectError where its field does not say."""
        if not isinstance(self.difficulty, str):
            return self.difficulty or 0.0
        value = record.get(self.difficulty)
        if not is_number(value) or abs(value) > MOST_DIFFICULT:
            raise RejectError(
                "difficulty",
                f"{self.difficulty} is {value!r:.100}, not a number up to {MOST_DIFFICULT:.1e}",
            )
        return float(value)


def read_meta(path: str | Path) -> tuple[Annotations, ...]:
    """Read the sources that a meta file lists.

    A meta file is JSON: ``{name: {"root": folder, "annotation": files, "repeat_time": 1,
    "max_dynamic_patch": 12, ...}}``. ``annotation`` is a file, a pattern, an Energon dataset's
    folder, or a list of those; ``length`` is compared with the records.

    Raises:
        FileNotFoundError: there is no such meta file, or no annotation file that it names.
        ValueError: not such JSON, an unknown key or a value that is not supported; says which
            entry.
    """
    if not is_remote(path) and not Path(path).is_file():
        raise FileNotFoundError(f"--meta {path}: there is no such file")
    with open_file(str(path)) as file:
        content = file.read()
    try:
        meta = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
        json.dumps(meta, ensure_ascii=False).encode()  # fails at halves of surrogate pairs
    except (ValueError, KeyError) as error:
        raise ValueError(f"--meta {path}: not JSON with unique names ({error})") from None
    if not isinstance(meta, dict) or not meta:
        raise ValueError(
            f"--meta {path}: must be a JSON object {{name: {{root, annotation, ...}}}} with at"
            " least one entry"
        )
    sources = tuple(
        source
        for name, entry in meta.items()
        for source in _entry(name, entry, f"--meta {path}: {name!r}")
    )
    unweighted = [source.name for source in sources if source.weight is None]
    easy = [source.name for source in sources if source.difficulty is None]
    for key, lacking in (("weight", unweighted), ("difficulty", easy)):
        if lacking and len(lacking) < len(sources):
            raise ValueError(
                f"--meta {path}: {lacking[0]!r} has no {key}, and others have; give all of them"
                " one, or none"
            )
    return sources


def read_sources(
    meta: str | None,
    annotation: str | None,
    root: str = "",
    *,
    augment: bool = False,
    difficulty: str | None = None,
    keep: Sequence[str] = (),
) -> tuple[Annotations, ...]:
    """Read the sources of ``meta``, or make one of ``annotation``, the folder of its images and
    the words of a filter; errors as in ``read_meta``.
    """
    if meta is None:
        return single_source(
            annotation or "",
            root,
            augment=augment,
            difficulty=difficulty,
            keep=parse_filter(keep, "--filter"),
        )
    for key, value, flag in (
        ("root", root, f" {root}"),
        ("data_augment", augment, ""),
        ("difficulty", difficulty, f" {difficulty}"),
        ("filter", keep, f" {' '.join(keep)}"),
    ):
        if value:
            raise ValueError(
                f"--{key}{flag}: goes with --jsonl; each entry of --meta has its own {key}"
            )
    return read_meta(meta)


def single_source(
    annotation: str | Path,
    root: str | Path = "",
    *,
    augment: bool = False,
    difficulty: str | None = None,
    keep: Filter | None = None,
) -> tuple[Annotations, ...]:
    """List the files of one source without a meta file; raises FileNotFoundError if there are
    none.
    """
    try:
        files = find_files(str(annotation))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--jsonl {annotation}: {error}") from None
    root = media_root(str(annotation), str(root))
    settings = {"root": root, "augment": augment, "difficulty": difficulty}
    settings["keep"] = keep or Filter()
    return tuple(Annotations(name=Path(annotation).stem, path=path, **settings) for path in files)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, refusing repeated names: JSON readers silently drop all but the last
    entry of a name.
    """
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KeyError(f"given twice: {', '.join(twice)}")
    return dict(pairs)


def _entry(name: str, entry: Any, where: str) -> list[Annotations]:
    """One entry of a meta file; ``where`` names it in errors."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, not {entry!r:.200}")
    refuse_unknown(entry, META_KEYS, where)
    root = entry.get("root", "")
    prompt = entry.get("prompt", "")
    augment = entry.get("data_augment", False)
    if not isinstance(root, str) or not isinstance(prompt, str):
        raise ValueError(f"{where}: root and prompt must be texts, not {root!r} and {prompt!r}")
    if not isinstance(augment, bool):
        raise ValueError(f"{where}: data_augment {augment!r} must be true or false")
    repeat = entry.get("repeat_time", 1)
    weight = entry.get("weight")
    for key, value in (("repeat_time", repeat), ("weight", 1 if weight is None else weight)):
        if not is_number(value) or not value > 0:
            raise ValueError(f"{where}: {key} {value!r:.100} must be a number above 0")
    difficulty = entry.get("difficulty")
    is_constant = is_number(difficulty) and abs(difficulty) <= MOST_DIFFICULT
    if not (difficulty is None or is_constant or (isinstance(difficulty, str) and difficulty)):
        raise ValueError(
            f"{where}: difficulty {difficulty!r:.100} must be the name of a field, or a number up"
            f" to {MOST_DIFFICULT:.1e} for all records"
        )
    length = entry.get("length")
    if length is not None and (type(length) is not int or length < 0):
        raise ValueError(f"{where}: length {length!r:.100} must be a number of records")
    most = entry.get("max_dynamic_patch")
    if most is not None and (type(most) is not int or not 1 <= most <= MOST_TILES):
        raise ValueError(
            f"{where}: max_dynamic_patch {most!r:.50} must be a whole number from 1 to {MOST_TILES}"
        )
    settings = {
        "repeat_time": float(repeat),
        "weight": None if weight is None else float(weight),
        "max_tiles": most,
        "augment": augment,
        "prompt": prompt,
        "difficulty": difficulty,
        "length": length,
        "keep": read_filter(entry.get("filter", {}), f"{where}: filter"),
    }
    return [
        Annotations(name=name, path=path, root=folder, **settings)
        for path, folder in _files(entry.get("annotation"), root, where)
    ]


def _files(given: Any, root: str, where: str) -> tuple[tuple[str, str], ...]:
    """Return the annotation files that an entry names, each with the root of its paths."""
    names = [given] if isinstance(given, str) else given
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ValueError(
            f"{where}: annotation must be a path, a pattern or a list of them, not {given!r:.200}"
        )
    for name in (*names, root):
        if "://" in name:
            raise ValueError(
                f"{where}: {name}: object storage is not supported; mount it, or copy the files"
            )
    try:
        return tuple((path, media_root(name, root)) for name in names for path in find_files(name))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
