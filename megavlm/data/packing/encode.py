"""From a record to a sample: images are looked at, frames chosen, tiles counted, the conversation
becomes tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.answers import count_answers, with_rejected
from megavlm.data.packing.media import DeepImages, Images, MediaReader
from megavlm.data.packing.shorten import cut_windows, truncated
from megavlm.data.packing.size_limits import SizeLimits
from megavlm.data.packing.windows import Windows
from megavlm.data.records.filters import Filter
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.record import Record
from megavlm.data.records.reject import Reject, RejectError, printable
from megavlm.data.sample import Image, Sample, extent
from megavlm.data.text.chat_tokens import ChatTemplate

Result = TypeVar("Result")
ALL = Filter()  # keeps every record


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
        self.layout = feature_layout(tiling.mode, template.features_per_tile)
        self.limits = SizeLimits(
            capacity=capacity,
            tile_cap=tile_cap,
            tiling=tiling,
            layout=self.layout,
            template=template,
        )
        self.media = MediaReader(
            tiling=tiling,
            frames=frames or FrameChoice(),
            deep_images=deep_images,
            with_times=tiling.shows_times(template.format),
        )
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
        stills = self._stills(record, max_tiles, images, keep)
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
        turns, pictures = self.media.shown(
            record.conversations,
            self._stills(record, max_tiles, images, keep),
            record.videos,
            images,
            seed=(self.seed, source, line),
        )
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

    def _stills(
        self, record: Record, max_tiles: int | None, how: Images, keep: Filter
    ) -> tuple[Image, ...]:
        """Read the images of a record."""
        count = len(record.images)
        return tuple(
            self.media.image(file, count, max_tiles, how, keep.check_image)
            for file in record.images
        )

    def _check_size(
        self, lengths: Sequence[int], sized: Sample | Size, videos: Sequence[str], keep: Filter
    ) -> None:
        """Refuse a sample by its size; ``lengths`` are those of its answers."""
        tokens = extent(lengths, self.alignment)
        self.limits.check(tokens, sized.images, videos, answers=len(lengths))
        keep.check_length(sum(lengths))


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
