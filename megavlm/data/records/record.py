"""The nouns of a record: what one entry of an annotation file says, whatever its form was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megavlm.data.records.reject import RejectError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
# Roles whose texts hold images and videos.
SHOWING_ROLES = ("human", "pretrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says.

    Args:
        role: ``system``, ``human`` or ``gpt``; or ``pretrain``, for a text without sides.
        text: as in the annotation file, with ``<image>`` where an image goes.
        learned: whether an answer has a loss.
    """

    role: str
    text: str
    learned: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """An image or a video.

    Args:
        path: of the file; of one inside an archive or a table, a name for messages.
        content: the file itself, if it is inside an archive, a table or the record.
    """

    path: str
    content: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video, or a clip of one.

    Args:
        file: the video file, or a folder of its frames.
        clip: start and end in seconds; None: all of it.
    """

    file: MediaFile
    clip: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of an annotation file.

    Args:
        conversations: the turns: system (optional), then human and gpt in alternation; or one
            ``pretrain`` turn.
        images: the images, in the order of their placeholders.
        videos: the videos, in the order of theirs.
        unread: keys of the record that were not read, sorted.
        rejected: the answer that is not preferred to the last turn, which it would stand in the
            place of; None: a record of one answer.
    """

    conversations: tuple[Turn, ...]
    images: tuple[MediaFile, ...] = ()
    videos: tuple[Video, ...] = ()
    unread: tuple[str, ...] = ()
    rejected: Turn | None = None


def _refuse_constant(name: str) -> float:
    """Refuse Python's NaN and Infinity, which other languages' JSON readers refuse too."""
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; JSON readers drop all but the last of two equal keys in silence."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return fields


JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a record that is written as JSON.

    Raises:
        RejectError: it is not a JSON object in UTF-8, or has a key twice.
    """
    try:
        # Editors put a byte order mark in front of a file.
        fields = JSON.decode(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RejectError("malformed_json", f"{error}") from None
    if not isinstance(fields, dict):
        raise RejectError("malformed_json", f"a JSON {type(fields).__name__}, not an object")
    return fields


def decode_text(data: bytes) -> str:
    """Decode a text file; raises RejectError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RejectError("malformed_json", f"a text file is not UTF-8: {error}") from None
