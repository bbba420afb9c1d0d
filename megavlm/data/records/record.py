"""Records: what one line of an annotation file says, in InternVL's format and in a few that mean
the same.

A record is one of

- ``{"conversations": [{"from": "system" | "human" | "gpt", "value": text}, ...]}``: a conversation,
  whose answers are learned;
- ``{"conversations": [{"from": "pretrain", "value": text}]}`` or ``{"text": text}``: a text, all of
  which is learned;
- ``{"caption": text}``: an image and what is to be said about it.

``image`` is a path, a list of paths, or absent, and ``<image>`` in the text of a human or a
pretrain turn is an image's place. ``video`` is a path, with its place ``<video>`` and, where only a
part of it is meant, ``"clip": [start, end]`` in seconds. In parquet files and archives the media
themselves stand in the place of paths. Other keys (``id``, ``width``, ...) are of no consequence.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.data.records.reject import RejectError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
FIELDS_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says.

    Args:
        role: ``system``, ``human`` or ``gpt``; or ``pretrain``, for a text without sides.
        text: as in the annotation file, with ``<image>`` where an image goes.
    """

    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """An image or a video.

    Args:
        path: of the file; of one that is inside an archive or a table, a name for messages.
        content: the file itself, where it is inside an archive or a table.
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
        video: the video; a record has images or a video.
    """

    conversations: tuple[Turn, ...]
    images: tuple[MediaFile, ...] = ()
    video: Video | None = None


def _no_number(name: str) -> float:
    """What JSON readers of other languages do with Python's NaN and Infinity: they are no JSON, and
    no size, score or time.
    """
    raise ValueError(f"{name} is not JSON")


JSON = json.JSONDecoder(parse_constant=_no_number)


def parse_json(text: bytes) -> dict[str, Any]:
    """The fields of a record that is written as JSON.

    Raises:
        RejectError: it is not a JSON object in UTF-8.
    """
    try:
        fields = JSON.decode(
            text.decode("utf-8-sig")
        )  # editors put a byte order mark in front of a file
    except (ValueError, RecursionError) as error:
        raise RejectError("malformed_json", f"{error}") from None
    if not isinstance(fields, dict):
        raise RejectError("malformed_json", f"a JSON {type(fields).__name__}, not an object")
    return fields


def parse_record(
    fields: Mapping[str, Any],
    *,
    root: str = "",
    files: Mapping[str, bytes] | None = None,
    prompt: str = "",
) -> Record:
    """The record that some fields make.

    A record with one image and no placeholder gets ``<image>`` and a newline at the start of its
    first human turn, as in InternVL; one with a video likewise.

    Args:
        fields: of the annotation file.
        root: folder that paths are relative to, and must stay inside; empty: any path is taken as
            it is.
        files: media that lie beside the record, by name.
        prompt: what the human turn of a caption says behind the image.

    Raises:
        RejectError: the fields are not a record, with the reason.
    """
    images = tuple(
        _media(entry, "image", root, files or {})
        for entry in _listed(fields.get("image", fields.get("images")), "image")
    )
    video = _video(fields, root, files or {})
    if video and images:
        raise RejectError("video", "the record has images and a video; only one kind is supported")
    turns = _turns(fields, prompt, len(images))
    if video:
        turns = _show_first(turns, VIDEO_PLACEHOLDER)
    elif len(images) == 1:
        turns = _show_first(turns, IMAGE_PLACEHOLDER)
    return Record(conversations=tuple(turns), images=images, video=video)


def _listed(field: Any, name: str) -> list[Any]:
    """A field that holds nothing, one thing or a list of them, as a list."""
    if field is None or (isinstance(field, (str, bytes)) and not field):
        return []
    return field if isinstance(field, list) else [field]


def _media(entry: Any, name: str, root: str, files: Mapping[str, bytes]) -> MediaFile:
    """An image or a video: a path, bytes, or the two in an object as Hugging Face's datasets store
    them.
    """
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
        return MediaFile(
            path=str(entry.get("path") or f"the record's {name}"), content=entry["bytes"]
        )
    if isinstance(entry, dict) and entry.get("bytes") is None:
        entry = entry.get("path")
    if isinstance(entry, bytes):
        return MediaFile(path=f"the record's {name}", content=entry)
    if not isinstance(entry, str) or not entry:
        raise RejectError(
            f"{name}_field", f"{name} {entry!r:.200} is not a path or a list of paths"
        )
    if entry in files:
        return MediaFile(path=entry, content=files[entry])
    path = os.path.join(root, entry)
    if root and not _is_inside(path, root):
        raise RejectError("outside_root", f"{name} {entry!r:.200} leads out of the root {root}")
    return MediaFile(path=path)


def _is_inside(path: str, root: str) -> bool:
    """Whether a path stays in a folder; links are followed by nobody here, whoever made them in the
    folder may have meant it.
    """
    if ".." not in path and path.startswith(os.path.join(root, "")):
        return True
    top = os.path.abspath(root)
    return os.path.commonpath([top, os.path.abspath(path)]) == top


def _video(fields: Mapping[str, Any], root: str, files: Mapping[str, bytes]) -> Video | None:
    """The record's video."""
    entries = _listed(fields.get("video"), "video")
    if not entries:
        return None
    if len(entries) > 1:
        raise RejectError("video", f"the record has {len(entries)} videos; one is supported")
    clip = fields.get("clip")
    if clip is not None:
        numbers = (
            isinstance(clip, list)
            and len(clip) == 2
            and all(type(end) in (int, float) and math.isfinite(end) for end in clip)
        )
        if not numbers or not 0 <= clip[0] < clip[1]:
            raise RejectError("video", f"clip {clip!r:.200} is not [start, end] in seconds")
        clip = (float(clip[0]), float(clip[1]))
    return Video(file=_media(entries[0], "video", root, files), clip=clip)


def _turns(fields: Mapping[str, Any], prompt: str, images: int) -> list[Turn]:
    """The record's turns: a conversation, a caption or a text."""
    kinds = [kind for kind in ("conversations", "caption", "text") if fields.get(kind) is not None]
    if not kinds:
        raise RejectError("conversation", "conversations is missing")
    if kinds[0] == "conversations":
        return _conversation(fields["conversations"])
    text = _text(fields[kinds[0]], kinds[0])
    if kinds[0] == "text":
        return [Turn(role="pretrain", text=text)]
    places = IMAGE_PLACEHOLDER * images
    return [
        Turn(role="human", text="\n".join(part for part in (places, prompt) if part)),
        Turn(role="gpt", text=text),
    ]


def _conversation(field: Any) -> list[Turn]:
    """The turns in a record's ``conversations`` field."""
    if not isinstance(field, list) or not field:
        raise RejectError("conversation", f"conversations is {field!r:.200}")
    turns = []
    for place, entry in enumerate(field):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("from"), str)
            or not isinstance(entry.get("value"), str)
        ):
            raise RejectError(
                "conversation",
                f"conversations[{place}] is {entry!r:.200}, not {{from: text, value: text}}",
            )
        learned = entry["from"] in ("gpt", "pretrain")
        text = (
            _text(entry["value"], f"conversations[{place}]")
            if learned
            else _unicode(entry["value"], f"conversations[{place}]")
        )
        turns.append(Turn(role=entry["from"], text=text))
    roles = [turn.role for turn in turns]
    if roles == ["pretrain"]:
        return turns
    spoken = roles[1:] if roles[0] == "system" else roles
    if (
        not spoken
        or len(spoken) % 2
        or any(role != ("human", "gpt")[place % 2] for place, role in enumerate(spoken))
    ):
        raise RejectError(
            "role_order",
            f"the turns are {', '.join(roles[:20])}; expected an optional system, then human, gpt,"
            " human, gpt, ..., or one pretrain",
        )
    return turns


def _text(value: Any, name: str) -> str:
    """A text that is to be learned, and so has something in it."""
    if not isinstance(value, str):
        raise RejectError("conversation", f"{name} is {value!r:.200}, not a text")
    if not value.strip():
        raise RejectError("empty_answer", f"{name} is empty, and it is what is to be learned")
    return _unicode(value, name)


def _unicode(text: str, name: str) -> str:
    """A text that can be written as UTF-8; JSON can escape halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectError(
            "conversation", f"{name} holds half of a surrogate pair, which is no text"
        ) from None
    return text


def _show_first(turns: list[Turn], placeholder: str) -> list[Turn]:
    """The turns, with a placeholder in front of the first that may hold it, where none of them
    does.
    """
    places = [place for place, turn in enumerate(turns) if turn.role in ("human", "pretrain")]
    if any(placeholder in turns[place].text for place in places):
        return turns
    first = turns[places[0]]
    return [
        *turns[: places[0]],
        Turn(role=first.role, text=f"{placeholder}\n{first.text}"),
        *turns[places[0] + 1 :],
    ]
