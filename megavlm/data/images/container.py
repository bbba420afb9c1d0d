"""Video files as PyAV reads them: the times of their frames, and the pixels of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, BinaryIO

import numpy as np

from megavlm.data.images.cut_off import check_whole
from megavlm.data.images.decode import MAX_PIXELS, describe

# One stamp of a frame is 8 bytes; a film of a day at 60 frames a second has fewer.
MAX_FRAMES = 2**23


@dataclass(frozen=True, kw_only=True, slots=True)
class Enough:
    """When enough of a video is known: at the first key frame behind so many ``frames``, and behind
    a time in ``seconds``.
    """

    frames: int
    seconds: float = 0.0


class VideoContainer:
    """Context of a video file, opened by PyAV, which gives errors of many kinds; all become
    ValueError. It closes the file.

    Args:
        opened: the file.
        enough: see ``frame_times``.
    """

    def __init__(self, opened: BinaryIO, enough: Enough | None = None) -> None:
        self._opened = opened
        try:
            check_whole(self._opened)
            self._open()
            self._stamps, self._keys = self._read_stamps(enough)
        except ModuleNotFoundError:
            self._opened.close()
            raise ValueError(
                "videos are decoded by PyAV, which is not installed: pip install 'megavlm[video]'"
            ) from None
        except Exception as error:
            self._opened.close()
            raise ValueError(f"not a video that can be read: {describe(error)}") from None

    def _open(self) -> None:
        import av

        self._opened.seek(0)
        # The file's content must not make it open others.
        self._container = av.open(self._opened, options={"protocol_whitelist": ""})
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_count = 1  # many workers already fill the cores

    def __enter__(self) -> VideoContainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()
        self._opened.close()

    def times(self) -> list[float]:
        """See ``frame_times``."""
        first = self._stamps[0] if self._stamps else 0
        return [float((stamp - first) * self._stream.time_base) for stamp in self._stamps]

    def size(self) -> tuple[int, int]:
        """Decode a frame at the start, and return its width and height in pixels, upright."""
        try:
            self._container.close()
            self._open()
            height, width, _ = _pixels(next(self._container.decode(self._stream))).shape
        except Exception as error:
            raise ValueError(f"its frames cannot be decoded: {describe(error)}") from None
        return width, height

    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Decode the frames with these indices, uint8 [height, width, 3], upright. Where the
        container can go to the key frame before each, only what follows it is decoded.
        """
        wanted = [self._stamps[number] for number in numbers]
        try:
            found = {} if self._has_only_order else self._behind_keys(wanted)
            if len(found) < len(wanted):
                found = self._from_start(wanted)
            if missing := len(wanted) - len(found):
                raise ValueError(
                    f"{missing} of the {len(wanted)} chosen frames are missing in the stream"
                )
        except Exception as error:
            raise ValueError(f"its frames cannot be decoded: {describe(error)}") from None
        return [found[stamp] for stamp in wanted]

    @property
    def _has_only_order(self) -> bool:
        """Whether frames have no time at which they are shown. AVI has none, and ASF one without
        the other; where frames are stored in another order, what PyAV gives for it is wrong.
        """
        is_old = self._container.format.name in ("avi", "asf")
        return is_old and self._stream.codec_context.has_b_frames

    def _behind_keys(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode frames from the key frame before each; fewer if a container goes elsewhere."""
        found: dict[int, np.ndarray] = {}
        while len(found) < len(wanted):
            start = wanted[len(found)]
            self._container.seek(
                max((key for key in self._keys if key <= start), default=start),
                stream=self._stream,
            )
            ends = [key for key in self._keys if key > start]
            group = [stamp for stamp in wanted[len(found) :] if not ends or stamp < ends[0]]
            before = len(found)
            for frame in self._container.decode(self._stream):
                stamp = frame.dts if frame.pts is None else frame.pts
                if stamp in group and stamp not in found:
                    found[stamp] = _pixels(frame)
                if stamp is not None and stamp >= group[-1]:
                    break
            if len(found) < before + len(group):
                break
        return found

    def _from_start(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode all up to the last of some frames. MPEG's streams need it, which have no index."""
        found: dict[int, np.ndarray] = {}
        self._container.close()
        self._open()
        decoded = self._container.decode(self._stream)
        # Two frames may have one stamp, as MPEG's streams have one for a packet of several frames.
        for frame, stamp in zip(decoded, chain(self._stamps, repeat(None)), strict=False):
            shown = stamp if self._has_only_order or frame.pts is None else frame.pts
            if shown in wanted and shown not in found:
                found[shown] = _pixels(frame)
            if len(found) == len(wanted):
                break
        return found

    def _read_stamps(self, enough: Enough | None) -> tuple[list[int], list[int]]:
        """Read the time stamps of all frames and of key frames, ascending, without decoding any."""
        stamps = []
        keys = []
        for packet in self._container.demux(self._stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or not packet.size:
                continue
            # Frames behind a key frame in the file may be shown before it, but not before it is
            # decoded.
            decoded = stamp if packet.dts is None else packet.dts
            if (
                enough
                and packet.is_keyframe
                and len(stamps) > enough.frames
                and (decoded - stamps[0]) * self._stream.time_base > enough.seconds
            ):
                break
            stamps.append(stamp)
            if packet.is_keyframe:
                keys.append(stamp)
            if len(stamps) > MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES} frames")
        return sorted(set(stamps)), sorted(keys)


def _pixels(frame: Any) -> np.ndarray:
    """Return the pixels of a frame as RGB, as they are to be shown."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(
            f"frames of {frame.width} x {frame.height} pixels; at most {MAX_PIXELS} pixels are"
            " decoded"
        )
    return _upright(frame.to_ndarray(format="rgb24"), frame)


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Turn and mirror pixels [height, width, 3] as the display matrix of a frame says, which phones
    write; to a multiple of 90 degrees.
    """
    from av.sidedata.sidedata import Type

    found = [data for data in frame.side_data if data.type == Type.DISPLAYMATRIX]
    if not found:
        return pixels
    # A point of column p and row q is shown at column a p + c q and row b p + d q, but for a shift
    # (display.h of FFmpeg).
    a, b, _, c, d = np.frombuffer(bytes(found[0]), np.int32).tolist()[:5]
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        of_column = c
        of_row = b
    else:
        of_column = a
        of_row = d
    if of_row < 0:
        pixels = pixels[::-1]
    if of_column < 0:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
