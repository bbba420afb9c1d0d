"""From a record to a sample: images are looked at, frames chosen, tiles counted, the conversation
becomes tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from megavlm.data.images.decode import check_pixels, load_decoders, read_header, scale_deep
from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.images.frame_sampling import FrameChoice, in_text_order, show_frames
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import (
    frames_as_images,
    open_media,
    read_frames,
    read_media,
    unread_frames,
)
from megavlm.data.packing.answers import count_answers, with_rejected
from megavlm.data.packing.shorten import cut_windows, truncated
from megavlm.data.packing.size_limits import SizeLimits
from megavlm.data.packing.windows import Windows
from megavlm.data.records.filters import Filter
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.record import (
    MediaFile,
    Record,
    Video,
)
from megavlm.data.records.reject import Reject, RejectError, printable
from megavlm.data.sample import Image, Sample, extent
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.io.remote import RemoteError, is_remote

DeepImages = Literal["clip", "scale", "reject"]
Result = TypeVar("Result")
ALL = Filter()  # keeps every record


class Images(Enum):
    """How far images and videos are read.

    HEADER: their sizes and frame times only; a file whose end is missing passes. Samples then hold
    no bytes. DECODE: the pixels too, to see that they can be; samples hold no bytes. LOAD: the
    bytes are kept in the sample; images are not decoded, frames of videos have to be.
    """

    HEADER = "header"
    DECODE = "decode"
    LOAD = "load"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large a sample is.

    Args:
        length: number of tokens; of a sample with a rejected answer, its ``extent``.
        images: without their bytes.
        tiles: of all images, thumbnails counted.
        difficulty: for a curriculum.
        unread: keys of the record that were not read.
        window: index of the part of a document that is cut, from 0.
    """

    length: int
    images: tuple[Image, ...]
    tiles: int
    difficulty: float
    unread: tuple[str, ...]
    window: int = 0


class Clip(NamedTuple):
    """The frames that are shown of a video, and their times in seconds."""

    images: tuple[Image, ...]
    times: list[float]


class Encoder:
    """Makes samples of records.

    Args:
        template: the conversation's tokens.
        tiling: the images' tiles.
        capacity: most tokens of a sample.
        tile_cap: most tiles of a sample; None: any number.
        frames: how frames of videos are chosen.
        deep_images: what becomes of images of more than 8 bits a channel.
        windows: how long documents are cut.
        truncate: tokens that the end of a longer sample is cut off after; 0: nothing is cut off.
        seed: fixes the frames that are chosen at random.
        preferences: whether each record has two answers, of which one is preferred.
        alignment: each answer of a sample starts at a multiple of this many tokens in its pack.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tiling: Tiling,
        capacity: int,
        tile_cap: int | None = None,
        *,
        frames: FrameChoice | None = None,
        deep_images: DeepImages = "clip",
        windows: Windows | None = None,
        truncate: int = 0,
        seed: int = 0,
        preferences: bool = False,
        alignment: int = 1,
    ) -> None:
        self.template = template
        self.tiling = tiling
        self.layout = feature_layout(tiling.mode, template.features_per_tile)
        self.limits = SizeLimits(
            capacity=capacity,
            tile_cap=tile_cap,
            tiling=tiling,
            layout=self.layout,
            template=template,
        )
        self.frames = frames or FrameChoice()
        self.with_times = tiling.pairs_frames and template.format.times_frames
        self.deep_images = deep_images
        self.windows = windows or Windows()
        self.truncate = truncate
        self.seed = seed
        self.preferences = preferences
        self.alignment = alignment

    def encode_raw(
        self, raw: RawRecord, annotations: Annotations, *, source: int, images: Images
    ) -> tuple[Sample, ...] | Reject:
        """Return the samples of one record of an annotation file (one, but for documents that are
        cut), or why there is none.

        Args:
            raw: the record as it is stored in the file.
            annotations: the file that it is from.
            source: index of the file.
            images: how far images are read.
        """
        return self._try(self.encode, raw, annotations, source, images)

    def measure_raw(
        self, raw: RawRecord, annotations: Annotations, *, source: int, images: Images
    ) -> tuple[Size, ...] | Reject:
        """Return the sizes of the samples of one record, or why there is none, as ``encode_raw``
        would, but faster.
        """
        return self._try(self.measure, raw, annotations, source, images)

    def _try(
        self,
        encode: Callable[..., tuple[Result, ...]],
        raw: RawRecord,
        annotations: Annotations,
        source: int,
        images: Images,
    ) -> tuple[Result, ...] | Reject:
        """Return what a method makes of a record, or why it makes nothing."""
        try:
            fields = raw.fields()
            annotations.keep.check_record(fields, annotations.path, raw.number)
            difficulty = annotations.difficulty_of(fields)
            record = parse_record(
                fields,
                root=annotations.root,
                files=raw.files,
                prompt=annotations.prompt,
                preferences=self.preferences,
            )
            return encode(
                record,
                source=source,
                line=raw.number,
                images=images,
                difficulty=difficulty,
                max_tiles=annotations.max_tiles,
                keep=annotations.keep,
            )
        except RejectError as error:
            return reject(raw, annotations, source, error)
        except OverflowError as error:
            large = RejectError("conversation", f"a number that is too large: {error}")
            return reject(raw, annotations, source, large)

    def measure(
        self,
        record: Record,
        *,
        source: int,
        line: int,
        images: Images,
        max_tiles: int | None = None,
        keep: Filter = ALL,
        difficulty: float = 0.0,
    ) -> tuple[Size, ...]:
        """Return the sizes of the samples that ``encode`` makes of a record; arguments and errors
        as there.
        """
        cuts = self.windows.cut and record.conversations[0].role == "pretrain"
        if cuts or self.truncate or record.videos:
            samples = self.encode(
                record,
                source=source,
                line=line,
                images=images,
                max_tiles=max_tiles,
                keep=keep,
                difficulty=difficulty,
            )
            return tuple(
                Size(
                    length=sample.extent(self.alignment),
                    images=sample.images,
                    tiles=sample.tiles,
                    difficulty=difficulty,
                    unread=sample.unread,
                    window=sample.window,
                )
                for sample in samples
            )
        stills = tuple(
            self._image(file, len(record.images), max_tiles, images, keep) for file in record.images
        )
        sizes = sizes_in_text(stills, self.layout)
        lengths = count_answers(record.conversations, record.rejected, self.template, *sizes)
        size = Size(
            length=extent(lengths, self.alignment),
            images=stills,
            tiles=sum(still.tiles for still in stills),
            difficulty=difficulty,
            unread=record.unread,
        )
        self._check_size(lengths, size, (), keep)
        return (size,)

    def encode(
        self,
        record: Record,
        *,
        source: int,
        line: int,
        images: Images,
        max_tiles: int | None = None,
        keep: Filter = ALL,
        difficulty: float = 0.0,
    ) -> tuple[Sample, ...]:
        """Return the samples of a record: one, or the windows of a document. What is too long is
        refused, unless ``truncate`` says where its end is cut off.

        Args:
            record: conversations, images and videos.
            source: index of the annotation file.
            line: number of the record in it, from 1.
            images: how far images are read.
            max_tiles: replaces the tiling's, for a source that has its own.
            keep: what the record must be like.
            difficulty: of the record.

        Raises:
            RejectError: the record cannot become a sample, with the reason.
        """
        turns = record.conversations
        stills = [
            self._image(file, len(record.images), max_tiles, images, keep) for file in record.images
        ]
        if record.videos:
            rng = np.random.default_rng((self.seed, source, line))
            clips = [self._clip(video, images, rng) for video in record.videos]
            pictures = in_text_order(turns, stills, [clip.images for clip in clips])
            turns = show_frames(
                turns,
                [clip.times for clip in clips],
                joined=self.tiling.joins_frames,
                with_times=self.with_times,
            )
        else:
            pictures = tuple(stills)
        tiles, shown = sizes_in_text(pictures, self.layout)
        tokens, supervised = self.template.encode(turns, tiles, shown)
        whole = Sample(
            tokens=tokens,
            supervised=supervised,
            images=pictures,
            source=source,
            line=line,
            difficulty=difficulty,
            unread=record.unread,
            instruction=self.template.instruction(turns, tiles),
        )
        if self.windows.cut and turns[0].role == "pretrain":
            samples = tuple(cut_windows(whole, self.windows, self.template, shown))
        else:
            whole = truncated(whole, self.truncate, self.template, shown)
            samples = (with_rejected(whole, turns, record.rejected, self.template, tiles, shown),)
        videos = [video.file.path for video in record.videos]
        for sample in samples:
            self._check_size([answer.length for answer in sample.answers], sample, videos, keep)
        return samples

    def _check_size(
        self, lengths: Sequence[int], sized: Sample | Size, videos: Sequence[str], keep: Filter
    ) -> None:
        """Refuse a sample by its size; ``lengths`` are those of its answers."""
        tokens = extent(lengths, self.alignment)
        self.limits.check(tokens, sized.images, videos, answers=len(lengths))
        keep.check_length(sum(lengths))

    def _image(
        self, file: MediaFile, images: int, max_tiles: int | None, how: Images, keep: Filter
    ) -> Image:
        """Read one of a record's ``images`` images."""
        try:
            if how is Images.HEADER:
                encoded = b""
                with open_media(file) as opened:
                    if is_remote(file.path):
                        opened.peek(1)  # a store that fails is no image that cannot be read
                    header = read_header(opened)
            else:
                encoded = read_media(file)
                header = read_header(encoded)
            if header.deep and self.deep_images == "reject":
                raise RejectError("deep_image", "more than 8 bits a channel (--deep_images)")
            if how is Images.DECODE:
                check_pixels(encoded)
            if header.deep and self.deep_images == "scale" and encoded:
                encoded = scale_deep(encoded)
            columns, rows = self.tiling.grid(header.width, header.height, images, max_tiles)
        except RejectError as error:
            raise RejectError(error.reason, f"{file.path}: {error.detail}") from None
        except RemoteError as error:
            raise RejectError("unreachable", str(error)) from None
        except OSError as error:
            raise RejectError("missing_image", f"{file.path}: {error.strerror or error}") from None
        except ValueError as error:
            raise RejectError("unreadable_image", f"{file.path}: {error}") from None
        keep.check_image(header.width, header.height)
        return Image(
            encoded=encoded if how is Images.LOAD else b"",
            width=header.width,
            height=header.height,
            columns=columns,
            rows=rows,
            tiles=self.tiling.count(columns, rows, images),
            name=file.path,
            deep=header.deep,
        )

    def _clip(self, video: Video, how: Images, rng: np.random.Generator) -> Clip:
        """Return the chosen frames of a video."""
        if not self.tiling.takes_frames:
            told = f"a video, but --tiling {self.tiling.mode} takes images alone"
            raise RejectError("unsupported", told)
        choose = partial(self.frames.choose, clip=video.clip, rng=rng)
        try:
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
        except RemoteError as error:
            raise RejectError("unreachable", str(error)) from None
        except OSError as error:
            raise RejectError(
                "missing_video", f"{video.file.path}: {error.strerror or error}"
            ) from None
        except RejectError as error:
            raise RejectError(error.reason, f"{video.file.path}: {error.detail}") from None
        except ValueError as error:
            raise RejectError("unreadable_video", f"{video.file.path}: {error}") from None
        return Clip(images, [frame.seconds for frame in frames])


def reject(raw: RawRecord, annotations: Annotations, source: int, error: RejectError) -> Reject:
    """Return the record of an error, with everything that finds the record again."""
    return Reject(
        file=printable(annotations.path, 4096),
        line=raw.number,
        location=raw.where(),
        source=source,
        offset=raw.offset,
        bytes=raw.size,
        reason=error.reason,
        detail=error.detail,
    )
