"""Which frames of a video are shown, and how they stand in the text.

A choice is made when the data are packed, since it fixes the tokens; it depends on the packer's
seed and the record alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from megavlm.data.images.native import PAIR
from megavlm.data.records.record import (
    IMAGE_PLACEHOLDER,
    SHOWING_ROLES,
    VIDEO_PLACEHOLDER,
    Turn,
)
from megavlm.data.records.reject import RejectError

Picture = TypeVar("Picture")
# More than any model reads, and than any camera takes.
MOST_FRAMES = 2**20
MOST_RATE = 1000
# Fewest frames at random or in the middle of equal parts, in InternVL.
_USUAL_LEAST = 8


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """How frames are chosen.

    Args:
        min_frames: fewest frames of a video that has as many; none: 8, and 1 at a rate.
        max_frames: most frames.
        multiple: the number of frames is a multiple of this, unless it is smaller.
        sampling: ``rand``: one from each of equal parts of the video, at random; ``middle``: the
            one in the middle of each part; ``fps0.5`` and the like: one every two seconds. Of rand
            and middle, the number of parts is drawn between the two bounds, as in InternVL.
    """

    min_frames: int | None = None
    max_frames: int = 32
    multiple: int = 1
    sampling: str = "rand"

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.max_frames <= MOST_FRAMES:
            raise ValueError(
                f"--min_frames {self.least} and --max_frames {self.max_frames}: must be 1 <="
                f" min <= max <= {MOST_FRAMES}"
            )
        is_rate = 0 < self.frames_per_second <= MOST_RATE
        if self.sampling not in ("rand", "middle") and not is_rate:
            raise ValueError(
                f"--frame_sampling {self.sampling}: must be rand, middle, or fps and a number above"
                f" 0 and up to {MOST_RATE}, such as fps0.5"
            )

    @property
    def least(self) -> int:
        """Fewest frames of a video that has as many."""
        if self.min_frames is None:
            return 1 if self.frames_per_second else _USUAL_LEAST
        return self.min_frames

    @property
    def frames_per_second(self) -> float:
        """The rate that ``sampling`` asks for; 0: none."""
        found = re.fullmatch(r"fps(\d+(?:\.\d+)?)", self.sampling)
        return float(found[1]) if found else 0.0

    def choose(
        self, times: Sequence[float], clip: tuple[float, float] | None, rng: np.random.Generator
    ) -> list[int]:
        """Numbers of the chosen frames, ascending. A video of fewer frames than wanted gives all of
        them, each once.

        Args:
            times: of the frames, in seconds from the first, ascending.
            clip: start and end in seconds; None: all of it.
            rng: draws.

        Raises:
            RejectError: there is no frame, or none in the clip.
        """
        stamps = np.asarray(times, np.float64)
        if not len(stamps):
            raise RejectError("unreadable_video", "it has no frames")
        start, end = clip or (0.0, float(stamps[-1]))
        first, behind = (int(index) for index in np.searchsorted(stamps, [start, end + 1e-6]))
        if first >= behind:
            raise RejectError(
                "unreadable_video",
                f"no frame between {start:g} and {end:g} s; the last is at {stamps[-1]:g} s",
            )
        if self.frames_per_second:
            return self._at_rate(stamps, first, behind)
        wanted = int(rng.integers(self.least, self.max_frames + 1))
        borders = np.linspace(first, behind, self._whole(wanted, behind - first) + 1).astype(int)
        if self.sampling == "middle":
            return _middles(borders)
        return rng.integers(borders[:-1], borders[1:]).tolist()

    def _whole(self, wanted: int, there: int) -> int:
        """Return how many frames are taken if so many are wanted of those that are there: a
        multiple as asked for, and no fewer than wanted, if that can be.
        """
        most = min(self.max_frames, there)
        up = -(-wanted // self.multiple) * self.multiple
        down = most // self.multiple * self.multiple
        return up if up <= most else down or most

    def _at_rate(self, stamps: np.ndarray, first: int, behind: int) -> list[int]:
        """Return the frames shown in the middles of equal spans of time; evenly spread ones if
        these are more or fewer than the limits.
        """
        span = 1 / self.frames_per_second
        shown = stamps[first:behind]
        # The last frame lasts as long as the ones before it do on average.
        duration = (shown[-1] - shown[0]) * (len(shown) / max(len(shown) - 1, 1))
        middles = shown[0] + np.arange(span / 2, max(duration, span / 2 + 1e-9), span)
        indices = np.unique(first + np.searchsorted(shown, middles + 1e-6, side="right") - 1)
        least = self._whole(self.least, behind - first)
        if len(indices) < least:
            return _middles(np.linspace(first, behind, least + 1).astype(int))
        if len(indices) > self.max_frames:
            most = self._whole(self.max_frames, len(indices))
            indices = indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]
        if len(indices) > self.multiple:
            indices = indices[: len(indices) // self.multiple * self.multiple]
        return indices.tolist()


def _middles(borders: np.ndarray) -> list[int]:
    """Return the frames in the middles of parts of a video between these borders."""
    return ((borders[:-1] + borders[1:] - 1) // 2).tolist()


def show_frames(
    turns: Sequence[Turn],
    frames: Sequence[Sequence[float]],
    *,
    joined: bool = False,
    with_times: bool = False,
) -> tuple[Turn, ...]:
    """Return the turns with what the text has in the place of each video: ``Frame-1: <image>`` and
    so on, a line each; or one ``<image>``; or ``<0.5 seconds><image>`` and so on.

    Args:
        turns: of a conversation.
        frames: of each video the times of its frames, in seconds.
        joined: whether the frames of a video are one image.
        with_times: whether each pair of them stands behind its time, in the line of the text
            (Qwen3-VL, arXiv 2511.21631, section 2).

    Raises:
        RejectError: the texts do not hold as many videos.
    """
    clips = iter(frames)

    def lines(found: re.Match[str]) -> str:
        times = next(clips, ())
        if with_times:
            return "".join(f"<{time:.1f} seconds>{IMAGE_PLACEHOLDER}" for time in _of_pairs(times))
        if joined:
            return found[0].replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
        return "".join(f"Frame-{number + 1}: {IMAGE_PLACEHOLDER}\n" for number in range(len(times)))

    place = f"{VIDEO_PLACEHOLDER}\n?"
    if with_times:
        place = f"\n?{place}"
    videos = sum(turn.text.count(VIDEO_PLACEHOLDER) for turn in turns if turn.role in SHOWING_ROLES)
    if videos != len(frames):
        raise RejectError(
            "placeholder_count",
            f"{videos} {VIDEO_PLACEHOLDER} placeholders, but {len(frames)} videos",
        )
    return tuple(
        replace(turn, text=re.sub(place, lines, turn.text)) if turn.role in SHOWING_ROLES else turn
        for turn in turns
    )


def _of_pairs(times: Sequence[float]) -> list[float]:
    """Return the mean time of each pair of frames; of an odd number the last stands alone."""
    firsts = times[::PAIR]
    seconds = [*times[1::PAIR], *firsts[len(times) // PAIR :]]
    return [(first + second) / 2 for first, second in zip(firsts, seconds, strict=True)]


def in_text_order(
    turns: Sequence[Turn], stills: Sequence[Picture], clips: Sequence[Sequence[Picture]]
) -> tuple[Picture, ...]:
    """Return images and frames in the order of their placeholders. If the texts hold more or fewer
    images, the template refuses them.
    """
    left_stills = iter(stills)
    left_clips = iter(clips)
    pictures: list[Picture] = []
    for turn in turns:
        if turn.role in SHOWING_ROLES:
            for sign in re.findall(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", turn.text):
                if sign == VIDEO_PLACEHOLDER:
                    pictures += next(left_clips, ())
                elif (still := next(left_stills, None)) is not None:
                    pictures.append(still)
    return (*pictures, *left_stills)
