"""Annotation files that are tar archives: WebDataset's shards, and Energon's, whose ``.nv-meta``
says what their files mean.

``0001.jpg`` and ``0001.json`` are one record. Archives are read by the offset of a record's first
file, so they must not be compressed.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from megavlm.data.records.energon import Dataset, describe_archive, map_fields
from megavlm.data.records.media_fields import (
    ALIASES,
    IMAGE_ENDINGS,
    IMAGE_KEYS,
    VIDEO_ENDINGS,
    VIDEO_KEYS,
)
from megavlm.data.records.raw_record import OffsetRange, RawRecord, in_ranges
from megavlm.data.records.record import decode_text, parse_json
from megavlm.data.records.reject import RejectError, printable
from megavlm.data.records.tar_files import ending, read_groups, record_key
from megavlm.io.remote import RemoteError, open_file

TEXT_ENDINGS = ("txt", "caption", "text")
# A record is read whole; a larger file is not part of one.
MAX_MEMBER_BYTES = 2**31
MAX_JSON_BYTES = 2**26


def open_archive(path: str) -> ArchiveFile:
    """Open an archive, as the Energon dataset that it lies in describes it, if it lies in one."""
    return ArchiveFile(path, describe_archive(path))


class ArchiveFile:
    """A tar file of records.

    Args:
        path: of the file.
        dataset: what its files mean; None: WebDataset's usual meaning, by their endings and the
            fields of their JSON.
    """

    def __init__(self, path: str, dataset: Dataset | None = None) -> None:
        self.path = path
        self.dataset = dataset

    def ranges(self, length: int) -> Iterator[OffsetRange]:
        """See ``Reader``; only the archive's headers are read.

        Raises:
            ValueError: the archive is damaged, or Energon has counted other records in it.
        """
        return in_ranges(
            (
                (members[0].offset, members[-1].offset_data + members[-1].size)
                for members in self._counted()
            ),
            length,
        )

    def read(self, offset: int, number: int, count: int) -> Iterator[RawRecord]:
        """See ``Reader``."""
        with open_file(self.path) as file:
            for step, members in zip(range(count), self._groups(offset), strict=False):
                yield self._record(file, members, number + step)

    def _groups(self, offset: int) -> Iterator[list[tarfile.TarInfo]]:
        """Yield the records that are not excluded."""
        for members in read_groups(self.path, offset):
            if not (self.dataset and self.dataset.excludes(self.path, record_key(members[0].name))):
                yield members

    def _counted(self) -> Iterator[list[tarfile.TarInfo]]:
        """Yield the records that are not excluded, and compare their number with Energon's."""
        expected = self.dataset.shard_count(self.path) if self.dataset else None
        count = 0
        for members in read_groups(self.path):
            count += 1
            if not (self.dataset and self.dataset.excludes(self.path, record_key(members[0].name))):
                yield members
        if expected is not None and count != expected:
            raise ValueError(
                f"{self.path}: {count} records, but .nv-meta/.info counts {expected}; restore the"
                " archive, or prepare the dataset again"
            )

    def _record(self, file: BinaryIO, members: list[tarfile.TarInfo], number: int) -> RawRecord:
        """Read the record of some members."""
        files = {}
        content: Mapping[str, Any] | RejectError
        try:
            for member in members:
                files[os.path.basename(member.name)] = _content(file, member)
            if self.dataset and self.dataset.fields:
                content = map_fields(self.dataset, _by_ending(files))
            else:
                content = usual_fields(files)
        except RejectError as error:
            content = error
            files = {}
        key = printable(record_key(members[0].name), 200)
        return RawRecord(
            offset=members[0].offset,
            number=number,
            content=content,
            files=files,
            size=members[-1].offset_data + members[-1].size - members[0].offset,
            location=f"record {number}, {key}",
        )


def usual_fields(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a record of WebDataset's kind: those of its JSON file, its text as a
    caption, and its media if the JSON names none. Files of other kinds are fields of no meaning,
    ``.npy``, so that they are reported.

    Raises:
        RejectError: the JSON or the text cannot be read, or there are several of them.
    """
    kinds: dict[str, list[str]] = {"json": [], "image": [], "video": [], "text": [], "other": []}
    for name in files:
        kinds[_kind(name.rpartition(".")[2].lower())].append(name)
    for kind in ("json", "text"):
        if len(kinds[kind]) > 1:
            raise RejectError(
                "missing_part",
                f"{len(kinds[kind])} files of kind {kind} in one record: {', '.join(kinds[kind])};"
                " names agree up to the first dot, so dots in base names join records: rename them",
            )
    fields: dict[str, Any] = {f".{name.partition('.')[2]}": files[name] for name in kinds["other"]}
    if kinds["json"]:
        fields |= parse_json(files[kinds["json"][0]])
    named = any(fields.get(key) for key in ("image", "images", "video", "videos"))
    if not named and (kinds["image"] or kinds["video"]):
        # The JSON may hold the paths that the media once had.
        fields = {key: value for key, value in fields.items() if key not in ALIASES}
        fields |= {kind: kinds[kind] for kind in ("image", "video") if kinds[kind]}
    if kinds["text"] and not any(
        fields.get(key) for key in ("conversations", "messages", "caption", "text")
    ):
        media = any(fields.get(key) for key in (*IMAGE_KEYS, *VIDEO_KEYS))
        fields["caption" if media else "text"] = decode_text(files[kinds["text"][0]])
    return fields


def _kind(last: str) -> str:
    """Return the kind of a file by the last part of its ending."""
    if last == "json":
        return "json"
    for kind, endings in (
        ("image", IMAGE_ENDINGS),
        ("video", VIDEO_ENDINGS),
        ("text", TEXT_ENDINGS),
    ):
        if last in endings:
            return kind
    return "other"


def _by_ending(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a record's files by their ending; raises RejectError if two have the same."""
    endings = [ending(name) for name in files]
    twice = sorted({each for each in endings if endings.count(each) > 1})
    if twice:
        raise RejectError(
            "missing_part", f"two files with the ending {twice[0]}: {', '.join(files)}"
        )
    return dict(zip(endings, files.values(), strict=True))


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Read a file of the archive."""
    if not member.isreg():
        raise RejectError(
            "missing_part",
            f"{member.name} is a link or a special file; archive the file itself (tar"
            " --hard-dereference --dereference)",
        )
    if member.size > (MAX_JSON_BYTES if member.name.endswith(".json") else MAX_MEMBER_BYTES):
        raise RejectError(
            "malformed_json",
            f"{member.name}: {member.size} bytes are too many for a part of a record",
        )
    try:
        file.seek(member.offset_data)
        data = file.read(member.size)
    except RemoteError as error:
        raise RejectError("unreachable", f"{member.name}: {error}") from None
    if len(data) != member.size:
        raise RejectError(
            "missing_part",
            f"{member.name}: the archive ends after {len(data)} of {member.size} bytes",
        )
    return data
