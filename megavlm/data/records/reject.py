"""Why a record does not become a sample: the table of reasons, and the noun that carries one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FILTERS = {
    "filtered_length": "the meta file's filter: too few or too many tokens",
    "filtered_size": (
        "the meta file's filter: an image with too few or too many pixels along a side"
    ),
    "filtered_aspect": "the meta file's filter: an image that is too long and narrow",
    "filtered_score": "the meta file's filter: a score that is out of bounds or no number",
}
REASONS = {
    "malformed_json": "the record is not a JSON object",
    "missing_part": "a file of the record is not in its archive",
    "conversation": "`conversations` is missing, empty or not a list of {from, value} with texts",
    "role_order": (
        "the turns are not: system (optional), then human and gpt in alternation, ending with gpt;"
        " nor one pretrain"
    ),
    "empty_answer": "an answer, a caption or a text to be learned is empty",
    "image_field": "`image` is not a path or a list of paths",
    "video_field": "`video` is not a path",
    "video": "several videos, images beside a video, or a clip that is no [start, end]",
    "outside_root": "a path leads out of the source's root",
    "placeholder_count": (
        "the texts hold more or fewer <image> or <video> placeholders than the record has images or"
        " videos"
    ),
    "image_token_in_text": (
        "a text holds <img>, </img> or <IMG_CONTEXT>, which only the packer may write"
    ),
    "missing_image": "an image file is not there or may not be read",
    "unreadable_image": "an image file cannot be decoded",
    "missing_video": "a video file is not there or may not be read",
    "unreadable_video": "a video cannot be decoded, or has no frames where they are wanted",
    "difficulty": "the field that says how difficult the record is holds no number",
    "changed": (
        "the record or its images were others when they were packed than when they were counted"
    ),
    "too_long": "the sample has more tokens than a pack",
    "too_many_tiles": "the sample has more tiles than a pack may hold",
    **FILTERS,
}


def count_unwanted(rejects: Mapping[str, int]) -> int:
    """Of the numbers of rejected records for each reason, those that no filter asked for."""
    return sum(count for reason, count in rejects.items() if reason not in FILTERS)


class RejectError(ValueError):
    """A record cannot become a sample.

    Args:
        reason: a key of ``REASONS``.
        detail: what is wrong with this record, with numbers.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that was left out.

    Args:
        file: annotation file.
        line: line in it, from 1.
        reason: a key of ``REASONS``.
        detail: what is wrong with this record, with numbers.
    """

    file: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"
