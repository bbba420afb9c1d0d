"""The order of a record's images and of the frames of its videos."""

from __future__ import annotations

import re

from megavlm.data.records.record import (
    IMAGE_PLACEHOLDER,
    SHOWING_ROLES,
    VIDEO_PLACEHOLDER,
    Record,
)
from megavlm.data.sample import Image


def in_text_order(
    record: Record, stills: list[Image], clips: list[tuple[Image, ...]]
) -> tuple[Image, ...]:
    """Return images and frames in the order of their placeholders. If the texts hold more or fewer
    images, the template refuses them.
    """
    left_stills = iter(stills)
    left_clips = iter(clips)
    pictures: list[Image] = []
    for turn in record.conversations:
        if turn.role in SHOWING_ROLES:
            for sign in re.findall(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", turn.text):
                if sign == VIDEO_PLACEHOLDER:
                    pictures += next(left_clips, ())
                elif (still := next(left_stills, None)) is not None:
                    pictures.append(still)
    return (*pictures, *left_stills)
