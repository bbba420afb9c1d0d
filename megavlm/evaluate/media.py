"""Images and videos of questions, whose content is read when they are answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megavlm.data.images.decode import load_decoders, read_size
from megavlm.data.images.frame_sampling import FrameChoice, in_text_order, show_frames
from megavlm.data.images.native import PAIR
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import (
    Enough,
    Frame,
    frames_as_images,
    read_frames,
    unread_frames,
)
from megavlm.data.records.record import Turn, Video
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.evaluate.task import AskedVideo, Question
from megavlm.io.storage import ReadError


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is shown of a video: frames from the middles of equal parts. Which ones these are is
    known when the whole video is read, by those who answer the question.

    Args:
        video: the file or folder, and the part of it.
        frames: those that are shown, without their content.
        multiple: as for ``FrameChoice``.
    """

    video: Video
    frames: tuple[Frame, ...]
    multiple: int = 1

    def choose(self, times: Sequence[float]) -> list[int]:
        """Return the numbers of the frames, of those at ``times``.

        Raises:
            ValueError: there are fewer than were counted.
        """
        count = len(self.frames)
        chosen = _middles(self.video, count, times, self.multiple)
        if len(chosen) < count:
            told = f"it has changed since the run began: {len(chosen)} frames, of {count}"
            raise ValueError(told)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Media:
    """The images of a question and the frames of its videos, without their content.

    Args:
        turns: of the question, with a placeholder for each image, and for each frame, or each pair
            of them, unless the frames of a video are one image in the text.
        images: in the order of the text; ``name`` is the path of the image or video.
        clips: the videos, in the order of the text; none for each image.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image, ...]
    clips: tuple[Clip | None, ...]


def media_of(question: Question, tiling: Tiling, where: str, *, with_times: bool) -> Media:
    """Return images and frames of a question as headers describe them.

    Args:
        question: what is asked.
        tiling: how images become tiles.
        where: the question, for messages.
        with_times: whether each pair of frames stands behind its time in the text.

    Raises:
        ValueError: an image or a video that cannot be read, or videos that the tiling cannot take.
    """
    count = len(question.images)
    stills = [image_of(path, tiling, count, where) for path in question.images]
    clips = [_clip_of(asked, tiling, where) for asked in question.videos]
    found = in_text_order(
        question.turns,
        [((still,), None) for still in stills],
        [[(_images_of(clip, tiling, where, with_times), clip)] for clip in clips],
    )
    turns = question.turns
    if clips:
        turns = show_frames(
            turns,
            [[frame.seconds for frame in clip.frames] for clip in clips],
            joined=tiling.joins_frames,
            with_times=with_times,
        )
    return Media(
        turns=tuple(turns),
        images=tuple(image for images, _ in found for image in images),
        clips=tuple(clip for _, clip in found),
    )


def image_of(path: Path, tiling: Tiling, images: int, where: str) -> Image:
    """Return an image as its header describes it, without its content."""
    try:
        width, height = read_size(path, tiling.exif_rotation)
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


def _clip_of(asked: AskedVideo, tiling: Tiling, where: str) -> Clip:
    """Return what is shown of a video. Of a long one only as much is read as tells that it has
    enough frames, since every process of a run does this; all of it if the text or positions depend
    on when the frames are.
    """
    video = asked.video
    if not tiling.takes_frames:
        raise ValueError(
            f"--eval.tasks {where}: has a video, but the packs are of --tiling {tiling.mode}, which"
            " takes images alone"
        )
    enough = None
    if not tiling.pairs_frames:
        enough = Enough(frames=asked.frames, seconds=video.clip[1] if video.clip else 0.0)
    multiple = PAIR if tiling.pairs_frames else 1
    try:
        frames = unread_frames(
            video.file,
            lambda times: _middles(video, asked.frames, times, multiple),
            tiling,
            enough,
        )
    except RejectError as error:
        raise ValueError(f"--eval.tasks {where}: {video.file.path}: {error.detail}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--eval.tasks {where}: {video.file.path}: {error}") from None
    return Clip(video=video, frames=tuple(frames), multiple=multiple)


def _middles(video: Video, frames: int, times: Sequence[float], multiple: int) -> list[int]:
    """Return the numbers of the frames, of those at ``times``, in the middles of so many parts."""
    choice = FrameChoice(min_frames=frames, max_frames=frames, multiple=multiple, sampling="middle")
    return choice.choose(times, video.clip, np.random.default_rng(0))


def _images_of(clip: Clip, tiling: Tiling, where: str, with_times: bool) -> tuple[Image, ...]:
    """Return the frames that are shown of a video, without their content."""
    name = clip.video.file.path
    try:
        return frames_as_images(clip.frames, name, tiling, with_times=with_times)
    except RejectError as error:
        raise ValueError(f"--eval.tasks {where}: {name}: {error.detail}") from None


def loaded(
    images: Sequence[Image], clips: Sequence[Clip | None], tiling: Tiling
) -> Iterator[Image]:
    """Yield images and frames with their content; arguments as in ``Media``, without ``clips`` if
    there are no videos.

    Raises:
        OSError: a file is not there any more.
        ReadError: a video that cannot be decoded, or that has changed.
    """
    start = 0
    for clip in clips or [None] * len(images):
        if clip is None:
            still = images[start]
            yield replace(still, encoded=Path(still.name).read_bytes())
            start += 1
        else:
            count = len(clip.frames)
            yield from _with_frames(images[start : start + count], clip, tiling)
            start += count


def _with_frames(images: Sequence[Image], clip: Clip, tiling: Tiling) -> Iterator[Image]:
    """Yield frames of one video with their content and their sizes."""
    load_decoders()
    try:
        frames = read_frames(clip.video.file, clip.choose, tiling)
    except ValueError as error:
        raise ReadError(f"--eval.tasks: {clip.video.file.path}: {error}") from None
    for image, frame in zip(images, frames, strict=True):
        yield replace(image, encoded=frame.encoded, width=frame.width, height=frame.height)
