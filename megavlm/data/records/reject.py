"""Why a record does not become a sample: the table of reasons, and the noun that carries one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FILTERS = {
    "filtered_length": "the filter: too few or too many tokens",
    "filtered_size": ("the filter: an image with too few or too many pixels along a side"),
    "filtered_aspect": "the filter: an image that is too long and narrow",
    "filtered_score": "the filter: a score that is out of bounds or not a number",
    "filtered_unscored": "the filter: a record without a score in the folder of scores",
    "filtered_duplicate": "the filter: an earlier record has nearly the same image",
}
# Repairing or restoring a media file mends these; the record is read again on resume.
REPAIRABLE = (
    "changed",
    "missing_image",
    "unreadable_image",
    "missing_video",
    "unreadable_video",
    "unreachable",
)
REASONS = {
    "malformed_json": "the record is not a JSON object, or a key occurs twice in it",
    "missing_part": "a file of the record is not in its archive, or two have one ending",
    "conversation": (
        "the record has no conversation, caption or text, or one that is not a list of turns"
    ),
    "role_order": (
        "the turns are not: system (optional), then human and gpt in alternation, ending with gpt;"
        " nor one pretrain"
    ),
    "empty_answer": "an answer, a caption or a text to be learned is empty, or none is learned",
    "no_preference": (
        "the record has not two answers, chosen and rejected, and --preferences is set"
    ),
    "same_answers": "the preferred answer and the rejected one are the same",
    "unsupported": (
        "the record has content that is not supported, such as tools or audio, or several questions"
        " for a template of one"
    ),
    "image_field": "an image is not a path or bytes, or two keys name different images",
    "video_field": "a video is not a path or bytes, or two keys name different videos",
    "video": "a clip is not [start, end], or belongs to more than one video",
    "outside_root": "a path leads out of the source's root",
    "placeholder_count": (
        "the texts hold more or fewer <image> or <video> placeholders than the record has images or"
        " videos, or hold them in a system turn"
    ),
    "no_pair": (
        "a record without an image or without a text, or with a video, has no similarity of the two"
        " (tools/score_dataset.py)"
    ),
    "missing_media": "a caption without an image or a video",
    "image_token_in_text": (
        "a text holds a token of images, such as <IMG_CONTEXT>, which only the packer may write"
    ),
    "missing_image": "an image file does not exist or may not be read",
    "unreadable_image": "an image file cannot be decoded",
    "image_shape": (
        "an image is longer and narrower than --tiling native takes: more than 200 to 1"
    ),
    "deep_image": "an image has more than 8 bits a channel, and --deep_images reject is set",
    "missing_video": "a video file does not exist or may not be read",
    "unreadable_video": "a video cannot be decoded, was cut off, or has no frames in its clip",
    "unreachable": "object storage did not give the record or its media, after several attempts",
    "difficulty": "the field with the record's difficulty does not hold a number",
    "changed": (
        "the record, its images or its videos changed between the two passes of the packer"
    ),
    "too_long": "the sample has more tokens than a pack",
    "too_many_tiles": "the sample has more tiles than a pack may hold",
    **FILTERS,
}
DETAIL_LENGTH = 400


def count_unwanted(rejects: Mapping[str, int]) -> int:
    """Sum the rejects by reason, without those that a filter asked for."""
    return sum(count for reason, count in rejects.items() if reason not in FILTERS)


def printable(text: str, length: int = DETAIL_LENGTH) -> str:
    """Return text that fits on a line of a terminal and can be written as UTF-8.

    Control characters and halves of surrogate pairs are escaped; a long text loses its middle.
    Every message about a record goes through here, because a record may hold anything.
    """
    if len(text) > length:
        half = length // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode()
                   for each in text)  # fmt: skip


class RejectError(ValueError):
    """A record cannot become a sample.

    Args:
        reason: a key of ``REASONS``.
        detail: what is wrong with this record, with numbers.
    """

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        detail = printable(detail)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that was left out.

    Args:
        file: annotation file.
        line: line, row or number of the record in it, from 1.
        location: the same in words: ``line 6``, ``record 6 at byte 1200``.
        source: index of the file in the job's list of sources.
        offset: where a reader finds the record again.
        bytes: size of the record in the file; 0: not known.
        reason: a key of ``REASONS``.
        detail: what is wrong with this record, with numbers.
    """

    file: str
    line: int
    location: str
    source: int
    offset: int
    bytes: int
    reason: str
    detail: str

    def __str__(self) -> str:
        where = f":{self.line}" if self.location == f"line {self.line}" else f", {self.location}"
        return f"{self.file}{where}: {self.reason}: {self.detail}"
