"""Annotation files that are tar archives: WebDataset's shards, and Energon's, which say in
``.nv-meta`` what their files mean.

Consecutive files whose names agree up to the first dot of their last part are one record:
``0001.jpg`` and ``0001.json``. Archives are read where they lie, by the place of a record's first
file, so they must not be compressed.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.data.records.raw_record import Block, Entry, in_blocks
from megavlm.data.records.record import parse_json
from megavlm.data.records.reject import RejectError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "gif", "img", "image")
VIDEO_ENDINGS = ("mp4", "mkv", "avi", "mov", "webm", "m4v", "video")
TEXT_ENDINGS = ("txt", "caption", "text")
# A record is read whole; a file above this size is no part of one.
MAX_MEMBER_BYTES = 2**31
MAX_JSON_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """What the files of an Energon dataset mean, by its ``field_map``.

    Args:
        kind: name of the sample's class in Energon.
        fields: for each field of the class, the ending of a file, with a path inside it where the
            file is JSON (``json[text]``).
    """

    kind: str
    fields: Mapping[str, str]


class ArchiveFile:
    """A tar file of records.

    Args:
        path: of the file.
        field_map: what its files mean; None: as is usual for WebDataset, by their endings and the
            fields of their JSON.
    """

    def __init__(self, path: str, field_map: FieldMap | None = None) -> None:
        self.path = path
        self.field_map = field_map

    def blocks(self, length: int) -> Iterator[Block]:
        """See ``EntryFile``; only the archive's headers are read."""
        return in_blocks(
            (
                (members[0].offset, members[-1].offset_data + members[-1].size)
                for members in self._records(0)
            ),
            length,
        )

    def read(self, offset: int, number: int, count: int) -> Iterator[Entry]:
        """See ``EntryFile``."""
        with open(self.path, "rb") as file:
            for step, members in zip(range(count), self._records(offset), strict=False):
                yield self._entry(file, members, number + step)

    def _records(self, offset: int) -> Iterator[list[tarfile.TarInfo]]:
        """The files of each record from ``offset`` on. An archive that is cut off ends with the
        record before the cut.
        """
        with open(self.path, "rb") as file:
            file.seek(offset)
            group: list[tarfile.TarInfo] = []
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    # Members that were read stay listed in the archive; they are dropped, or a
                    # large archive would fill the memory.
                    while (member := archive.next()) is not None:
                        archive.members = []
                        if not member.isreg() or os.path.basename(member.name).startswith("."):
                            continue
                        if group and _key(group[0].name) != _key(member.name):
                            yield group
                            group = []
                        group.append(member)
            except tarfile.ReadError as error:
                if not group and offset == 0:
                    raise ValueError(
                        f"{self.path}: not an uncompressed tar archive ({error})"
                    ) from None
            if group:
                yield group

    def _entry(self, file: Any, members: list[tarfile.TarInfo], number: int) -> Entry:
        """The record of some files."""
        files = {}
        content = None
        try:
            for member in members:
                files[os.path.basename(member.name)] = _content(file, member)
            by_ending = {name.partition(".")[2].lower(): data for name, data in files.items()}
            content = (
                map_fields(self.field_map, by_ending) if self.field_map else usual_fields(files)
            )
        except RejectError as error:
            content = error
            files = {}
        return Entry(offset=members[0].offset, number=number, content=content, files=files)


def usual_fields(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a record of WebDataset's kind: those of its JSON file, its text as a caption,
    and its media where the JSON names none.

    Raises:
        RejectError: the JSON or the text cannot be read.
    """
    fields: dict[str, Any] = {}
    by_ending: dict[str, list[str]] = {"image": [], "video": [], "text": []}
    for name, data in files.items():
        ending = name.rpartition(".")[2].lower()
        if ending == "json":
            fields |= parse_json(data)
        for kind, endings in (
            ("image", IMAGE_ENDINGS),
            ("video", VIDEO_ENDINGS),
            ("text", TEXT_ENDINGS),
        ):
            if ending in endings:
                by_ending[kind].append(name)
    if not any(fields.get(kind) for kind in ("image", "images", "video")):
        fields["image"] = by_ending["image"]
        fields["video"] = by_ending["video"]
    if by_ending["text"] and not any(
        fields.get(kind) for kind in ("conversations", "caption", "text")
    ):
        text = _decode(files[by_ending["text"][0]])
        fields["caption" if by_ending["image"] or by_ending["video"] else "text"] = text
    return fields


def map_fields(field_map: FieldMap, by_ending: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a record of an Energon dataset.

    Raises:
        RejectError: a file that the map names is not there or cannot be read.
    """
    values = {name: _mapped(path, by_ending) for name, path in field_map.fields.items()}
    image = values.get("image")
    text = {name: value for name, value in values.items() if name != "image"}
    if field_map.kind == "VQASample":
        answers = values.get("answers")
        answer = answers[0] if isinstance(answers, list) and answers else answers
        turns = [
            {"from": "human", "value": _as_text(values.get("context"))},
            {"from": "gpt", "value": _as_text(answer)},
        ]
        return {"image": image, "conversations": turns}
    if field_map.kind == "CaptioningSample":
        return {"image": image, "caption": _as_text(text.get("caption"))}
    return {"text": _as_text(text.get("text"))}


def _mapped(path: str, by_ending: Mapping[str, bytes]) -> Any:
    """What stands at a path such as ``json[conversations][0][value]``; ``png;jpg`` is the first of
    them that is there.
    """
    for choice in path.split(";"):
        ending, *steps = re.split(r"[\[\]]+", choice.rstrip("]"))
        if ending not in by_ending:
            continue
        data = by_ending[ending]
        if ending.rpartition(".")[2] in IMAGE_ENDINGS:
            return data
        if ending.rpartition(".")[2] != "json":
            return _decode(data)
        value: Any = parse_json(b'{"":%s}' % data)[""]
        for step in steps:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RejectError("malformed_json", f"{choice}: there is no {step!r}") from None
        return value
    raise RejectError(
        "missing_part", f"the record has no file {path}; it has {', '.join(sorted(by_ending))}"
    )


def _as_text(value: Any) -> Any:
    """A value that JSON or a text file held; bytes are no text."""
    return _decode(value) if isinstance(value, bytes) else value


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RejectError("malformed_json", f"a text file is not UTF-8: {error}") from None


def _content(file: Any, member: tarfile.TarInfo) -> bytes:
    """The content of a file in the archive."""
    if member.size > (MAX_JSON_BYTES if member.name.endswith(".json") else MAX_MEMBER_BYTES):
        raise RejectError(
            "malformed_json",
            f"{member.name}: {member.size} bytes are too many for a part of a record",
        )
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise RejectError(
            "missing_part",
            f"{member.name}: the archive ends after {len(data)} of {member.size} bytes",
        )
    return data


def _key(name: str) -> str:
    """What the names of a record's files have in common."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def energon_files(folder: Path) -> tuple[list[str], FieldMap | None]:
    """The archives of the training split of an Energon dataset, and what their files mean.

    Raises:
        ValueError: its ``.nv-meta`` cannot be read, or describes samples of a kind that is not
            supported.
    """
    import yaml

    meta = folder / ".nv-meta"
    try:
        split = yaml.safe_load((meta / "split.yaml").read_text(encoding="utf-8"))
        kind = yaml.safe_load((meta / "dataset.yaml").read_text(encoding="utf-8"))
        names = list(split["split_parts"]["train"])
        excluded = set(split.get("exclude") or ())
        name = str((kind.get("sample_type") or kind)["__class__"])
        fields = {
            key: str(value)
            for key, value in (kind.get("field_map") or {}).items()
            if not key.startswith("__")
        }
    except (
        OSError,
        yaml.YAMLError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{meta}: needs split.yaml with split_parts and dataset.yaml with sample_type"
            f" ({type(error).__name__}: {error})"
        ) from None
    shards = sorted(
        path
        for shard in names
        for path in expand(str(folder / shard))
        if os.path.relpath(path, folder) not in excluded
    )
    if name == "CrudeWebdataset":
        return shards, None
    if name not in ("CaptioningSample", "VQASample", "TextSample") or not fields:
        raise ValueError(
            f"{meta}: samples of kind {name} are not supported; those are CaptioningSample,"
            " VQASample and TextSample with a field_map, and CrudeWebdataset"
        )
    return shards, FieldMap(kind=name, fields=fields)


def expand(pattern: str) -> list[str]:
    """The names that a pattern with ranges such as ``shard-{000..127}.tar`` stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first = found[1]
    last = found[2]
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    return [
        name
        for number in numbers
        for name in expand(
            pattern[: found.start()] + f"{number:0{width}d}" + pattern[found.end() :]
        )
    ]
