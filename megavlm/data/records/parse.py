"""From the fields of a record to a ``Record``: its form, its images and videos, and the checks that
hold for every form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megavlm.data.records.forms import Statement, read_statement, unicode_text
from megavlm.data.records.media_fields import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    find_media,
    media_file,
    read_videos,
)
from megavlm.data.records.preferences import ANSWER_KEYS, read_preference
from megavlm.data.records.record import (
    IMAGE_PLACEHOLDER,
    SHOWING_ROLES,
    VIDEO_PLACEHOLDER,
    Record,
    Turn,
)
from megavlm.data.records.reject import RejectError, printable

SYSTEM_KEYS = ("system", "system_prompt")
# Content without which the record would say something else.
REFUSED_KEYS = (
    "tools",
    "functions",
    "audio",
    "audios",
    "rejected_images",
    "rejected_messages",
)
ALTERNATION = ("human", "gpt")
EMPTY = ("", "[]", "{}", "null")


def parse_record(
    fields: Mapping[str, Any],
    *,
    root: str = "",
    files: Mapping[str, bytes] | None = None,
    prompt: str = "",
    preferences: bool = False,
) -> Record:
    """Return the record that some fields make.

    A record with one image and no placeholder gets ``<image>`` and a newline at the start of its
    first human turn, as in InternVL; one with a video likewise.

    Args:
        fields: of the annotation file.
        root: folder that paths are relative to, and must stay inside; empty: paths are taken as
            they are.
        files: media that are stored beside the record, by name.
        prompt: what the human turn of a caption says behind the image.
        preferences: whether each record has two answers, of which one is preferred.

    Raises:
        RejectError: the fields are not a record, with the reason.
    """
    _refuse(fields, preferences)
    images, image_key = find_media(fields, IMAGE_KEYS, "image")
    videos, video_key = find_media(fields, VIDEO_KEYS, "video")
    media = len(images) + len(videos)
    rejected = None
    if preferences:
        statement, rejected = read_preference(fields, media, prompt)
    else:
        statement = read_statement(fields, media, prompt)
    images = _placed(images, statement, "image")
    videos = _placed(videos, statement, "video")
    turns = _with_system(statement.turns, fields)
    _check_roles(turns)
    turns = _with_placeholders(turns, len(images), len(videos), "caption" in statement.keys)
    others = fields.keys() - statement.keys
    if others:
        others -= {*SYSTEM_KEYS, *REFUSED_KEYS, *ANSWER_KEYS, image_key, video_key, "clip"}
    unread = {str(key) for key in others if fields[key] not in (None, "", [])}
    return Record(
        conversations=tuple(turns),
        images=tuple(media_file(entry, "image", root, files or {}) for entry in images),
        videos=read_videos(videos, fields, root, files or {}),
        unread=tuple(sorted(printable(key, 100) for key in unread | statement.unread)),
        rejected=rejected,
    )


def _refuse(fields: Mapping[str, Any], preferences: bool) -> None:
    """Refuse a record with content that is not read."""
    refused = REFUSED_KEYS if preferences else (*REFUSED_KEYS, *ANSWER_KEYS)
    for key in refused:
        if key not in fields:
            continue
        value = fields[key]
        if value and value not in EMPTY:
            why = "which is not supported"
            if key in ANSWER_KEYS:
                why = "which only tools/pack_dataset.py --preferences reads"
            raise RejectError("unsupported", f"the record has {key}, {why}")


def _placed(listed: list[Any], statement: Statement, name: str) -> list[Any]:
    """Return the images or videos in the order of their placeholders: those that parts of turns
    hold, and the record's list for the parts that hold none.
    """
    inline = statement.media[name]
    if not inline and "images" not in statement.keys:
        return listed
    if "images" in statement.keys and name == "image":
        return inline
    if not any(entry is not None for entry in inline):
        return listed
    left = iter(listed)
    placed = [next(left, None) if entry is None else entry for entry in inline]
    if next(left, None) is not None:
        raise RejectError(f"{name}_field", f"the record lists more {name}s than its turns have")
    return placed


def _with_system(turns: list[Turn], fields: Mapping[str, Any]) -> list[Turn]:
    """Return the turns with the system message that stands beside the conversation."""
    for key in SYSTEM_KEYS:
        if fields.get(key):
            text = unicode_text(fields[key], key)
            if turns[0].role == "pretrain":
                raise RejectError("unsupported", f"{key} beside a text that is learned as a whole")
            if turns[0].role == "system":
                if turns[0].text != text:
                    raise RejectError(
                        "role_order", f"{key} and a system turn differ; keep one of them"
                    )
                continue
            turns = [Turn(role="system", text=text), *turns]
    return turns


def _check_roles(turns: list[Turn]) -> None:
    """Refuse turns in another order than system (optional), human, gpt, human, gpt, ..., and
    records without a learned turn.
    """
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if roles != ["pretrain"] and (
        not spoken or spoken != [*ALTERNATION] * (len(spoken) // len(ALTERNATION))
    ):
        raise RejectError(
            "role_order",
            f"the turns are {', '.join(roles[:20])}; expected an optional system, then human, gpt,"
            " human, gpt, ..., or one pretrain",
        )
    if not any(turn.learned for turn in turns if turn.role in ("gpt", "pretrain")):
        raise RejectError("empty_answer", "no answer is learned: each has loss or weight 0")
    for turn in turns:
        if turn.role == "system":
            for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
                if placeholder in turn.text:
                    raise RejectError(
                        "placeholder_count",
                        f"a system turn holds {placeholder}; only human turns show images",
                    )


def _with_placeholders(turns: list[Turn], images: int, videos: int, caption: bool) -> list[Turn]:
    """Return the turns with as many placeholders as there are images and videos."""
    counts = {sign: _count(turns, sign) for sign in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)}
    if videos == 1 and not images and counts == {IMAGE_PLACEHOLDER: 1, VIDEO_PLACEHOLDER: 0}:
        # LLaVA-Video writes <image> for the video.
        turns = [
            replace(turn, text=turn.text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER))
            if turn.role in SHOWING_ROLES
            else turn
            for turn in turns
        ]
        return turns
    if caption and not any(counts.values()):
        signs = IMAGE_PLACEHOLDER * images + VIDEO_PLACEHOLDER * videos
        return _show_first(turns, signs if _is_silent(turns) else f"{signs}\n")
    for sign, number in ((IMAGE_PLACEHOLDER, images), (VIDEO_PLACEHOLDER, videos)):
        if number == 1 and images + videos == 1 and not counts[sign]:
            turns = _show_first(turns, f"{sign}\n")
    if _count(turns, VIDEO_PLACEHOLDER) != videos:
        raise RejectError(
            "placeholder_count",
            f"{_count(turns, VIDEO_PLACEHOLDER)} {VIDEO_PLACEHOLDER} placeholders, but {videos}"
            " videos",
        )
    return turns


def _count(turns: list[Turn], placeholder: str) -> int:
    found = 0
    for turn in turns:
        if placeholder in turn.text and turn.role in SHOWING_ROLES:
            found += turn.text.count(placeholder)
    return found


def _show_first(turns: list[Turn], signs: str) -> list[Turn]:
    """Return the turns with placeholders in front of the first that may hold them."""
    index = next(index for index, turn in enumerate(turns) if turn.role in SHOWING_ROLES)
    shown = replace(turns[index], text=signs + turns[index].text)
    return [*turns[:index], shown, *turns[index + 1 :]]


def _is_silent(turns: list[Turn]) -> bool:
    """Return whether a caption's source has no prompt."""
    return not turns[0].text if turns[0].role == "human" else not turns[1].text
