"""Records: the lines of annotation files in InternVL's JSONL format, and the meta file that lists annotation files.

One line is one JSON object: ``conversations``, a list of ``{"from": "system" | "human" | "gpt", "value": text}``, and ``image``, a path, a
list of paths, or absent. ``<image>`` in a human turn is an image's place. Other keys (``id``, ``width``, ...) are of no consequence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.data.reject import RejectError

IMAGE_PLACEHOLDER = "<image>"
META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says.

    Args:
        role: ``system``, ``human`` or ``gpt``.
        text: as in the annotation file, with ``<image>`` where an image goes.
    """

    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of an annotation file.

    Args:
        conversations: the turns: system (optional), then human and gpt in alternation.
        images: paths of the image files, in the order of their placeholders.
        source: number of the annotation file, from 0.
        line: line in the annotation file, from 1.
    """

    conversations: tuple[Turn, ...]
    images: tuple[str, ...]
    source: int
    line: int


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """One annotation file and how to take it: an entry of a meta file.

    Args:
        name: of the data set, for reports.
        path: the JSONL file.
        root: folder that image paths are relative to.
        repeat_time: how often each record is taken; below 1, the first share of the records, rounded down, as in InternVL.
        max_tiles: most tiles of an image of this source; None: the packer's setting.
    """

    name: str
    path: str
    root: str = ""
    repeat_time: float = 1.0
    max_tiles: int | None = None

    @property
    def repeats(self) -> int:
        """How often each record that is taken is taken."""
        return max(1, int(self.repeat_time))


def read_meta(path: str | Path) -> tuple[Annotations, ...]:
    """The annotation files that a meta file lists.

    A meta file is JSON: ``{name: {"root": folder, "annotation": file.jsonl, "repeat_time": 1, "max_dynamic_patch": 12, ...}}``. ``length``
    is read by nobody; ``data_augment`` must be false.

    Raises:
        FileNotFoundError: there is no such meta file, or no annotation file that it names.
        ValueError: not such JSON, an unknown key or a value that is not supported; says which entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--meta {path}: there is no such file")
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"--meta {path}: not JSON with unique names ({error})") from None
    if not isinstance(meta, dict) or not meta:
        raise ValueError(f"--meta {path}: must be a JSON object {{name: {{root, annotation, ...}}}} with at least one entry")
    return tuple(_meta_entry(name, entry, f"--meta {path}: {name!r}") for name, entry in meta.items())


def read_sources(meta: str | None, jsonl: str | None, root: str = "") -> tuple[Annotations, ...]:
    """The annotation files of ``meta``, or the one file ``jsonl`` with the folder of its images; errors as in ``read_meta``."""
    if meta is None:
        return (single_file(jsonl or "", root),)
    if root:
        raise ValueError(f"--root {root}: goes with --jsonl; each entry of --meta has its own root")
    return read_meta(meta)


def single_file(path: str | Path, root: str | Path = "") -> Annotations:
    """One annotation file without a meta file; raises FileNotFoundError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--jsonl {path}: there is no such file")
    return Annotations(name=Path(path).stem, path=str(path), root=str(root))


def read_lines(path: str | Path, start: int = 0, count: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset in bytes, text) of the lines of a file from offset ``start`` on, one at a time; at most ``count`` lines."""
    with open(path, "rb") as file:
        offset = file.seek(start)
        while count is None or count > 0:
            line = file.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)
            count = None if count is None else count - 1


def count_records(path: str | Path) -> int:
    """Records of an annotation file: its lines that are not blank."""
    with open(path, "rb") as file:
        return sum(not line.isspace() for line in file)


def parse_record(text: bytes, *, source: int, line: int, root: str = "") -> Record:
    """The record of one line of an annotation file.

    A record with one image and no placeholder gets ``<image>`` and a newline at the start of its first human turn, as in InternVL.

    Args:
        text: the line, UTF-8.
        source: number of the annotation file.
        line: line in it, from 1.
        root: folder that image paths are relative to.

    Raises:
        RejectError: the line is not a record, with the reason.
    """
    try:
        fields = json.loads(text.decode("utf-8-sig"))  # editors put a byte order mark in front of a file
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RejectError("malformed_json", str(error)) from None
    if not isinstance(fields, dict):
        raise RejectError("malformed_json", f"a JSON {type(fields).__name__}, not an object")
    if fields.get("video"):
        raise RejectError("video", f"video {fields['video']!r:.200}")
    images = tuple(os.path.join(root, path) for path in _image_paths(fields.get("image")))
    turns = _turns(fields.get("conversations"))
    if len(images) == 1 and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "human"):
        first = next(place for place, turn in enumerate(turns) if turn.role == "human")
        turns[first] = Turn(role="human", text=f"{IMAGE_PLACEHOLDER}\n{turns[first].text}")
    return Record(conversations=tuple(turns), images=images, source=source, line=line)


def _image_paths(field: Any) -> list[str]:
    """The paths in a record's ``image`` field."""
    if field is None or field == "":
        return []
    paths = [field] if isinstance(field, str) else field
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise RejectError("image_field", f"image {field!r:.200} is not a path or a list of paths")
    return paths


def _turns(field: Any) -> list[Turn]:
    """The turns in a record's ``conversations`` field."""
    if not isinstance(field, list) or not field:
        raise RejectError("conversation", "conversations is missing" if field is None else f"conversations is {field!r:.200}")
    turns = []
    for place, entry in enumerate(field):
        if not isinstance(entry, dict) or not isinstance(entry.get("from"), str) or not isinstance(entry.get("value"), str):
            raise RejectError("conversation", f"conversations[{place}] is {entry!r:.200}, not {{from: text, value: text}}")
        if not _is_unicode(entry["value"]):
            raise RejectError("conversation", f"conversations[{place}] holds half of a surrogate pair, which is no text")
        turns.append(Turn(role=entry["from"], text=entry["value"]))
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or any(role != ("human", "gpt")[place % 2] for place, role in enumerate(spoken)):
        raise RejectError(
            "role_order", f"the turns are {', '.join(roles[:20])}; expected an optional system, then human, gpt, human, gpt, ..."
        )
    return turns


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can escape halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names must differ: of two entries of one name, JSON readers drop the first in silence."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KeyError(f"given twice: {', '.join(twice)}")
    return dict(pairs)


def _meta_entry(name: str, entry: Any, where: str) -> Annotations:
    """One entry of a meta file; ``where`` names it in errors."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, not {entry!r:.200}")
    unknown = sorted(set(entry) - set(META_KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, unknown))}; known: {', '.join(META_KEYS)}")
    root, path = entry.get("root", ""), entry.get("annotation")
    if not isinstance(path, str) or not isinstance(root, str):
        raise ValueError(f"{where}: annotation and root must be paths, not {path!r} and {root!r}")
    if "://" in path or "://" in root:
        raise ValueError(f"{where}: {path if '://' in path else root}: object storage is not supported; mount it, or copy the files")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: annotation {path}: there is no such file")
    if entry.get("data_augment", False) is not False:
        raise ValueError(f"{where}: data_augment {entry['data_augment']!r} is not supported yet; set it to false")
    repeat = entry.get("repeat_time", 1)
    if (
        isinstance(repeat, bool)
        or not isinstance(repeat, (int, float))
        or not (0 < repeat < 1 or (repeat >= 1 and float(repeat).is_integer()))
    ):
        raise ValueError(f"{where}: repeat_time {repeat!r} must be a whole number of at least 1, or a share between 0 and 1")
    most = entry.get("max_dynamic_patch")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"{where}: max_dynamic_patch {most!r} must be a whole number of at least 1")
    return Annotations(name=name, path=path, root=root, repeat_time=float(repeat), max_tiles=most)
