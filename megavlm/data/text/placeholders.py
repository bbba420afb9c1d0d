"""Placeholders of images in the texts of a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megavlm.data.records.record import IMAGE_PLACEHOLDER, SHOWING_ROLES, Turn
from megavlm.data.records.reject import RejectError

# An image, or a frame of a video with what stands in front of it on its line.
_PICTURE = re.compile(rf"(Frame-\d+: )?{IMAGE_PLACEHOLDER}")


def check_placeholders(turns: Sequence[Turn], images: int, shown: Sequence[str]) -> None:
    """Refuse texts that hold an image's tokens, and more or fewer placeholders than images.

    Args:
        turns: of the conversation.
        images: of the record.
        shown: the tokens that an image becomes.
    """
    placeholders = 0
    for turn in turns:
        shows = turn.role in SHOWING_ROLES
        for token in shown:
            if token in turn.text and not (shows and token == IMAGE_PLACEHOLDER):
                raise RejectError(
                    "image_token_in_text",
                    f"a {turn.role} turn holds {token} {turn.text.count(token)} times",
                )
        if shows:
            placeholders += turn.text.count(IMAGE_PLACEHOLDER)
    if placeholders != images:
        raise RejectError(
            "placeholder_count",
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the texts that show images,"
            f" but {images} images",
        )


def check_single(turns: Sequence[Turn], template: str) -> None:
    """Refuse several questions, and system turns, for a template whose samples are one question."""
    roles = [turn.role for turn in turns]
    if roles.count("human") > 1 or "system" in roles:
        raise RejectError(
            "unsupported",
            f"{roles.count('human')} questions and {roles.count('system')} system turns, but a"
            f" sample of --template {template} has one question alone",
        )


def without_images(text: str) -> str:
    """Take the placeholders of images, and the white space around them, out of a text; of a frame
    of a video, its number too.
    """
    parts = _PICTURE.sub(IMAGE_PLACEHOLDER, text).split(IMAGE_PLACEHOLDER)
    return " ".join(part.strip() for part in parts if part.strip())


def with_image_first(text: str) -> str:
    """Put the one image of a text in front of it, on a line of its own; a text with several stays
    as it is, and so do the lines of a video's frames, however many.
    """
    found = [picture[1] for picture in _PICTURE.finditer(text)]
    if found != [None]:
        return text
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()
