"""Images and videos of records, as tilings make tiles of them; what cannot be read is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from megavlm.data.images.decode import check_pixels, load_decoders, read_header, scale_deep
from megavlm.data.images.frame_sampling import FrameChoice, in_text_order, show_frames
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import (
    frames_as_images,
    open_media,
    read_frames,
    read_media,
    unread_frames,
)
from megavlm.data.records.record import MediaFile, Turn, Video
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.io.remote import RemoteError, is_remote

DeepImages = Literal["clip", "scale", "reject"]


class Images(Enum):
    """How far images and videos are read.

    HEADER: their sizes and frame times only; a file whose end is missing passes. Samples then hold
    no bytes. DECODE: the pixels too, to see that they can be; samples hold no bytes. LOAD: the
    bytes are kept in the sample; images are not decoded, frames of videos have to be.
    """

    HEADER = "header"
    DECODE = "decode"
    LOAD = "load"


class Clip(NamedTuple):
    """The frames that are shown of a video, and their times in seconds."""

    images: tuple[Image, ...]
    times: list[float]


class Shown(NamedTuple):
    """Turns with a placeholder for each image, and the images in their order."""

    turns: Sequence[Turn]
    images: tuple[Image, ...]


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads images and videos.

    Args:
        tiling: the images' tiles.
        frames: how frames of videos are chosen.
        deep_images: what becomes of images of more than 8 bits a channel.
        with_times: whether each pair of frames stands behind its time in the text.
    """

    tiling: Tiling
    frames: FrameChoice
    deep_images: DeepImages
    with_times: bool

    def image(
        self,
        file: MediaFile,
        images: int,
        max_tiles: int | None,
        how: Images,
        check: Callable[[int, int], None],
    ) -> Image:
        """Read an image.

        Args:
            file: the image.
            images: of its record.
            max_tiles: replaces the tiling's, for a source that has its own.
            how: far it is read.
            check: refuses it by its width and height.

        Raises:
            RejectError: it cannot become tiles, with the reason.
        """
        with _refused(file.path, "image"):
            if how is Images.HEADER:
                encoded = b""
                with open_media(file) as opened:
                    if is_remote(file.path):
                        opened.peek(1)  # a store that fails is no image that cannot be read
                    header = read_header(opened, self.tiling.exif_rotation)
            else:
                encoded = read_media(file)
                header = read_header(encoded, self.tiling.exif_rotation)
            if header.deep and self.deep_images == "reject":
                raise RejectError("deep_image", "more than 8 bits a channel (--deep_images)")
            if how is Images.DECODE:
                check_pixels(encoded)
            if header.deep and self.deep_images == "scale" and encoded:
                encoded = scale_deep(encoded)
            columns, rows = self.tiling.grid(header.width, header.height, images, max_tiles)
        check(header.width, header.height)
        return Image(
            encoded=encoded if how is Images.LOAD else b"",
            width=header.width,
            height=header.height,
            columns=columns,
            rows=rows,
            tiles=self.tiling.count(columns, rows, images),
            name=file.path,
            deep=header.deep,
            turned=header.turned,
        )

    def shown(
        self,
        turns: Sequence[Turn],
        stills: Sequence[Image],
        videos: Sequence[Video],
        how: Images,
        *,
        seed: tuple[int, ...],
    ) -> Shown:
        """Put the chosen frames of videos in their places.

        Args:
            turns: with a placeholder for each image and each video.
            stills: the images.
            videos: in the order of the text.
            how: far they are read.
            seed: fixes the frames that are chosen at random.

        Raises:
            RejectError: a video cannot be read, or there are more or fewer than placeholders.
        """
        if not videos:
            return Shown(turns, tuple(stills))
        rng = np.random.default_rng(seed)
        clips = [self._clip(video, how, rng) for video in videos]
        return Shown(
            show_frames(
                turns,
                [clip.times for clip in clips],
                joined=self.tiling.joins_frames,
                with_times=self.with_times,
            ),
            in_text_order(turns, stills, [clip.images for clip in clips]),
        )

    def _clip(self, video: Video, how: Images, rng: np.random.Generator) -> Clip:
        """Return the chosen frames of a video."""
        if not self.tiling.takes_frames:
            told = f"a video, but --tiling {self.tiling.mode} takes images alone"
            raise RejectError("unsupported", told)
        choose = partial(self.frames.choose, clip=video.clip, rng=rng)
        with _refused(video.file.path, "video"):
            if how is Images.HEADER:
                frames = unread_frames(video.file, choose, self.tiling)
            else:
                load_decoders()
                frames = read_frames(video.file, choose, self.tiling)
            for number, frame in enumerate(frames if how is Images.DECODE else ()):
                check_pixels(frame.encoded)
                frames[number] = dataclasses.replace(frame, encoded=b"")
            name = video.file.path
            images = frames_as_images(frames, name, self.tiling, with_times=self.with_times)
        return Clip(images, [frame.seconds for frame in frames])


@contextmanager
def _refused(path: str, kind: str) -> Iterator[None]:
    """Context in which errors of a file, an image or a video, become RejectError."""
    try:
        yield
    except RejectError as error:
        raise RejectError(error.reason, f"{path}: {error.detail}") from None
    except RemoteError as error:
        raise RejectError("unreachable", str(error)) from None
    except OSError as error:
        raise RejectError(f"missing_{kind}", f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RejectError(f"unreadable_{kind}", f"{path}: {error}") from None
