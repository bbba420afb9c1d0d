"""Images and videos of questions, whose content is read when they are answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megavlm.data.images.decode import load_decoders, read_size
from megavlm.data.images.frame_sampling import FrameChoice, in_text_order, show_frames
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import UNREAD, frame_times, frames_as_images, read_frames
from megavlm.data.records.record import MediaFile, Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.evaluate.task import AskedVideo, Question
from megavlm.io.storage import ReadError


@dataclass(frozen=True, kw_only=True)
class Media:
    """The images of a question and the frames of its videos, without their content.

    Args:
        turns: of the question, with a placeholder for each image, and for each frame unless the
            frames of a video are one image in the text.
        images: in the order of the text; ``name`` is the path of the image or video.
        frames: number of each in its video, from 0; -1: it is an image.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image, ...]
    frames: tuple[int, ...]


def media_of(question: Question, tiling: Tiling, where: str) -> Media:
    """Return images and frames of a question as headers describe them.

    Args:
        question: what is asked.
        tiling: how images become tiles.
        where: the question, for messages.

    Raises:
        ValueError: an image or a video that cannot be read, or videos that the tiling cannot take.
    """
    count = len(question.images)
    stills = [(image_of(path, tiling, count, where), -1) for path in question.images]
    clips = [_frames_of(asked, tiling, where) for asked in question.videos]
    found = in_text_order(question.turns, stills, clips)
    turns = question.turns
    if clips:
        turns = show_frames(turns, [len(clip) for clip in clips], joined=tiling.joins_frames)
    return Media(
        turns=tuple(turns),
        images=tuple(image for image, _ in found),
        frames=tuple(number for _, number in found),
    )


def image_of(path: Path, tiling: Tiling, images: int, where: str) -> Image:
    """Return an image as its header describes it, without its content."""
    try:
        width, height = read_size(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--eval.tasks {where}: {path}: {error}") from None
    columns, rows = tiling.grid(width, height, images=images)
    return Image(
        encoded=b"",
        width=width,
        height=height,
        columns=columns,
        rows=rows,
        tiles=tiling.count(columns, rows, images),
        name=str(path),
    )


def _frames_of(asked: AskedVideo, tiling: Tiling, where: str) -> list[tuple[Image, int]]:
    """Return the frames that are shown of a video, with their numbers."""
    path = asked.video.file.path
    if not tiling.takes_frames:
        raise ValueError(
            f"--eval.tasks {where}: has a video, but the packs are of --tiling {tiling.mode}, which"
            " takes images alone"
        )
    choice = FrameChoice(min_frames=asked.frames, max_frames=asked.frames, sampling="middle")
    try:
        times = frame_times(asked.video.file)
        chosen = choice.choose(times, asked.video.clip, np.random.default_rng(0))
    except RejectError as error:
        raise ValueError(f"--eval.tasks {where}: {path}: {error.detail}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--eval.tasks {where}: {path}: {error}") from None
    images = frames_as_images([UNREAD] * len(chosen), path, joined=tiling.joins_frames)
    return list(zip(images, chosen, strict=True))


def loaded(images: Sequence[Image], frames: Sequence[int], tiling: Tiling) -> Iterator[Image]:
    """Yield images and frames with their content; arguments as in ``Media``, without ``frames`` if
    there are no videos.

    Raises:
        OSError: a file is not there any more.
        ReadError: a video that cannot be decoded.
    """
    frames = frames or [-1] * len(images)
    start = 0
    while start < len(images):
        name = images[start].name
        end = start + 1
        # Frames of one video are read at once.
        while end < len(images) and images[end].name == name and frames[end] > frames[end - 1] >= 0:
            end += 1
        if frames[start] < 0:
            yield replace(images[start], encoded=Path(name).read_bytes())
        else:
            yield from _with_frames(images[start:end], frames[start:end], tiling)
        start = end


def _with_frames(
    images: Sequence[Image], numbers: Sequence[int], tiling: Tiling
) -> Iterator[Image]:
    """Yield frames of one video with their content and their sizes."""
    load_decoders()
    name = images[0].name
    try:
        frames = read_frames(MediaFile(path=name), numbers, tiling)
    except ValueError as error:
        raise ReadError(f"--eval.tasks: {name}: {error}") from None
    for image, frame in zip(images, frames, strict=True):
        yield replace(image, encoded=frame.encoded, width=frame.width, height=frame.height)
