"""Why a record does not become a sample: the table of reasons, and the noun that carries one."""

from __future__ import annotations

from dataclasses import dataclass

REASONS = {
    "malformed_json": "the line is not a JSON object",
    "conversation": "`conversations` is missing, empty or not a list of {from, value} with texts",
    "role_order": "the turns are not: system (optional), then human and gpt in alternation, ending with gpt",
    "image_field": "`image` is not a path or a list of paths",
    "video": "the record has a video; only images are supported",
    "placeholder_count": "the human turns hold more or fewer <image> placeholders than the record has images",
    "image_token_in_text": "a text holds <img>, </img> or <IMG_CONTEXT>, which only the packer may write",
    "missing_image": "an image file is not there or may not be read",
    "unreadable_image": "an image file cannot be decoded",
    "changed": "the record or its images were others when they were packed than when they were counted",
    "too_long": "the sample has more tokens than a pack",
    "too_many_tiles": "the sample has more tiles than a pack may hold",
}


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
