"""Video files, animated images and folders of frames: when their frames are, and some of them as
images. Videos need PyAV.

A frame becomes one tile, or with ``--tiling native`` as many as its size asks for. A frame of a
folder keeps its file's bytes. Frames that have to be decoded are stored with the size of their
tiles, as JPEG of quality 95 without loss of colour resolution: a tenth of what their pixels would
take, and finer than the video, which is compressed already; the resizing is InternVL's, and comes
before it.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as PillowImage

from megavlm.data.images.container import MAX_FRAMES, Enough, VideoContainer
from megavlm.data.images.cut_off import is_gif_cut
from megavlm.data.images.decode import describe, open_image, read_size, resized
from megavlm.data.images.native import PAIR
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.transforms import centre_crop, to_square
from megavlm.data.records.record import MediaFile
from megavlm.data.sample import Image
from megavlm.io.remote import is_remote, open_file

JPEG_QUALITY = 95
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A frame as stored.

    Args:
        encoded: an image; empty if it was not read.
        width, height: before it was encoded, in pixels; 0 if they were not asked for.
        seconds: its time from the first frame.
    """

    encoded: bytes
    width: int
    height: int
    seconds: float


Choose = Callable[[Sequence[float]], Sequence[int]]
"""Returns the numbers of some frames, ascending, from the times of all."""


def frame_times(file: MediaFile, enough: Enough | None = None) -> list[float]:
    """When the frames of a video are, in seconds from the first, ascending; those of a folder are a
    second apart.

    Args:
        file: the video.
        enough: after how many frames, and behind which time, the rest need not be read; none: all
            are read.

    Raises:
        OSError: there is no such file.
        ValueError: not a video that can be read, one that was cut off, or PyAV is missing.
    """
    if _is_folder(file):
        return _folder_times(_frame_files(file))
    if _is_animation(file):
        with open_media(file) as opened:
            return _animation_times(open_image(opened), opened)
    with VideoContainer(open_media(file), enough) as container:
        return container.times()


def unread_frames(
    file: MediaFile, choose: Choose, tiling: Tiling, enough: Enough | None = None
) -> list[Frame]:
    """Return some frames of a video without their content, and without their size unless their
    tiles depend on it; arguments and errors are those of ``frame_times`` and ``read_frames``.
    """
    times = frame_times(file, enough)
    chosen = choose(times)
    size = (0, 0)
    if tiling.pairs_frames and len(chosen):
        size = _frame_size(file, chosen[0], tiling)
    return [
        Frame(encoded=b"", width=size[0], height=size[1], seconds=times[number])
        for number in chosen
    ]


def read_frames(file: MediaFile, choose: Choose, tiling: Tiling) -> list[Frame]:
    """Read some frames of a video.

    Args:
        file: the video.
        choose: chooses the frames; what it raises is raised.
        tiling: how a frame becomes tiles.

    Raises:
        OSError: there is no such file.
        ValueError: not a video that can be read, or one of these frames cannot be decoded.
        RejectError: frames of a shape that ``tiling`` does not take.
    """
    if _is_folder(file):
        files = _frame_files(file)
        chosen = choose(_folder_times(files))
        frames = [_stored(files[number], float(number), tiling) for number in chosen]
        _check_sizes(tiling, ((frame.width, frame.height) for frame in frames))
        return frames
    if _is_animation(file):
        with open_media(file) as opened:
            image = open_image(opened)
            times = _animation_times(image, opened)
            chosen = choose(times)
            decoded = _animation_frames(image, chosen)
    else:
        with VideoContainer(open_media(file)) as container:
            times = container.times()
            chosen = choose(times)
            decoded = list(map(PillowImage.fromarray, container.frames(chosen)))
    _check_sizes(tiling, (image.size for image in decoded))
    return [
        _encode(image, times[number], tiling, len(chosen))
        for image, number in zip(decoded, chosen, strict=True)
    ]


def frames_as_images(
    frames: Sequence[Frame], name: str, tiling: Tiling, *, with_times: bool = False
) -> tuple[Image, ...]:
    """Return the frames of a video as images.

    Args:
        frames: of a video.
        name: of its file, for messages.
        tiling: how they become tiles.
        with_times: whether each pair of them stands behind its time in the text.
    """
    count = len(frames)
    grid = (1, 1)
    if count:
        grid = tiling.frame_grid(frames[0].width, frames[0].height, count)
    columns, rows = grid
    interval = 0.0
    if tiling.pairs_frames and count > 1:
        interval = PAIR * (frames[-1].seconds - frames[0].seconds) / (count - 1)
    images = []
    for number, frame in enumerate(frames):
        is_second = tiling.pairs_frames and number % PAIR == 1
        left = count - number if tiling.joins_frames else 0
        images.append(
            Image(
                encoded=frame.encoded,
                width=frame.width,
                height=frame.height,
                columns=columns,
                rows=rows,
                tiles=0 if is_second else columns * rows,
                frames=min(left, PAIR - number % PAIR) if with_times else left,
                interval=interval,
                name=name,
            )
        )
    return tuple(images)


def _frame_size(file: MediaFile, number: int, tiling: Tiling) -> tuple[int, int]:
    """Return width and height of a frame in pixels; of a video all frames have one size."""
    if _is_folder(file):
        frame = _stored(_frame_files(file)[number], 0.0, tiling)
        return frame.width, frame.height
    if _is_animation(file):
        with open_media(file) as opened:
            return open_image(opened).size
    with VideoContainer(open_media(file), Enough(frames=0)) as container:
        return container.size()


def _check_sizes(tiling: Tiling, sizes: Iterable[tuple[int, int]]) -> None:
    """Raise ValueError if frames that are read in pairs have different sizes."""
    found = sorted(set(sizes))
    if tiling.pairs_frames and len(found) > 1:
        told = ", ".join(f"{width} x {height}" for width, height in found[:3])
        raise ValueError(f"its frames have different sizes in pixels: {told}")


def _stored(path: Path, seconds: float, tiling: Tiling) -> Frame:
    """Return a frame that is an image file; errors name it."""
    try:
        encoded = read_media(MediaFile(path=str(path)))
        width, height = read_size(encoded, tiling.exif_rotation)
    except OSError as error:
        raise OSError(error.errno, f"{path.name}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return Frame(encoded=encoded, width=width, height=height, seconds=seconds)


def _encode(image: PillowImage.Image, seconds: float, tiling: Tiling, frames: int) -> Frame:
    """Encode a decoded frame, one of so many of its video, with the size of its tiles."""
    square = image if tiling.pad_colour is None else to_square(image, tiling.pad_colour)
    if tiling.mode == "crop":
        square = centre_crop(square, tiling.tile_size, tiling.resample)
    grid = tiling.frame_grid(image.width, image.height, frames)
    pixels = resized(np.asarray(square), *grid, tiling.tile_size, tiling.resample)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Frame(encoded=file.getvalue(), width=image.width, height=image.height, seconds=seconds)


def _is_folder(file: MediaFile) -> bool:
    return file.content is None and os.path.isdir(file.path)


def _is_animation(file: MediaFile) -> bool:
    """Return whether Pillow reads a file: a GIF, WebP or PNG."""
    with open_media(file) as opened:
        head = opened.read(12)
    return head.startswith((b"GIF8", b"\x89PNG")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def open_media(file: MediaFile) -> Any:
    """Open a file of a record for reading.

    Raises:
        OSError: there is none, or it is no regular file; a pipe or a device would be read for ever.
    """
    if file.content is not None:
        return io.BytesIO(file.content)
    if is_remote(file.path):
        return open_file(file.path)
    _check_regular(file.path)
    return open(file.path, "rb")


def read_media(file: MediaFile) -> bytes:
    """Read a file of a record; errors as in ``open_media``."""
    if file.content is not None:
        return file.content
    if is_remote(file.path):
        with open_file(file.path) as opened:
            return opened.read()
    _check_regular(file.path)
    # Read at once, so without a buffer.
    with open(file.path, "rb", buffering=0) as opened:
        return opened.read()


def _check_regular(path: str) -> None:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(None, "a directory, not a file")
    if not stat.S_ISREG(mode):
        raise OSError(None, "a pipe or a device, not a file")


def _frame_files(file: MediaFile) -> list[Path]:
    """List the images of a folder, in the order of the last number in their names. Hidden files,
    such as those that macOS puts beside each image, are none.

    Raises:
        ValueError: there is none.
    """
    paths = [
        path
        for path in Path(file.path).iterdir()
        if path.suffix.lower() in FRAME_ENDINGS and not path.name.startswith(".")
    ]
    if not paths:
        raise ValueError(f"it has no frames, files that end with {', '.join(FRAME_ENDINGS)}")
    return sorted(
        paths, key=lambda path: (int((re.findall(r"\d+", path.stem) or ["0"])[-1]), path.name)
    )


def _folder_times(files: Sequence[Path]) -> list[float]:
    return [float(number) for number in range(len(files))]


def _animation_times(image: PillowImage.Image, opened: BinaryIO) -> list[float]:
    """When the frames of an animated image are."""
    times = []
    now = 0.0
    first = _first_frame(image)
    try:
        # Pillow counts the frames of a GIF by reading them.
        for number in range(first, MAX_FRAMES if image.format == "GIF" else image.n_frames):
            image.seek(number)
            if image.format == "WEBP":
                image.load()  # which finds the duration
            times.append(now)
            # Browsers show frames without a duration for a tenth of a second.
            now += (image.info.get("duration") or 100) / 1000
    except EOFError:
        if image.format != "GIF" or is_gif_cut(opened):
            raise ValueError(f"cut off: it ends behind {len(times)} frames") from None
    except Exception as error:
        raise ValueError(f"an animation that cannot be read: {describe(error)}") from None
    if len(times) == MAX_FRAMES:
        raise ValueError(f"a GIF of more than {MAX_FRAMES} frames")
    return times


def _first_frame(image: PillowImage.Image) -> int:
    """Return Pillow's number of the first frame of an animation. A PNG may begin with an image for
    programs that do not know animations, which is none of its frames.
    """
    return int(image.info.get("default_image", False))


def _animation_frames(image: PillowImage.Image, numbers: Sequence[int]) -> list[PillowImage.Image]:
    """Read some frames of an animated image."""
    frames = []
    first = _first_frame(image)
    try:
        for number in numbers:
            image.seek(first + number)
            frames.append(image.convert("RGB"))
    except Exception as error:
        raise ValueError(
            f"frame {numbers[len(frames)]} cannot be decoded: {describe(error)}"
        ) from None
    return frames
