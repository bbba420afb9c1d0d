"""From a record to a sample: images are looked at, frames chosen, tiles counted, the conversation
becomes tokens.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from megavlm.data.images.decode import check_pixels, load_decoders, read_size
from megavlm.data.images.frame_sampling import FrameChoice, show_frames
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import frame_times, open_media, read_frames
from megavlm.data.records.meta_file import Annotations, Filter
from megavlm.data.records.raw_record import Entry
from megavlm.data.records.record import MediaFile, Record, Video, parse_record
from megavlm.data.records.reject import Reject, RejectError
from megavlm.data.sample import Image, Sample
from megavlm.data.text.chat_tokens import ChatTemplate


class Images(Enum):
    """How far images and videos are read.

    HEADER: their sizes and frame times only; a file whose end is missing passes. Samples then hold
    no bytes. DECODE: the pixels too, to see that they can be; samples hold no bytes. LOAD: the
    bytes are kept in the sample; images are not decoded, frames of videos have to be.
    """

    HEADER = "header"
    DECODE = "decode"
    LOAD = "load"


class Encoder:
    """Makes samples of records.

    Args:
        template: the conversation's tokens.
        tiling: the images' tiles.
        capacity: most tokens of a sample.
        tile_cap: most tiles of a sample; None: any number.
        frames: how frames of videos are chosen.
        seed: fixes the frames that are chosen at random.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tiling: Tiling,
        capacity: int,
        tile_cap: int | None = None,
        *,
        frames: FrameChoice | None = None,
        seed: int = 0,
    ) -> None:
        self.template = template
        self.tiling = tiling
        self.capacity = capacity
        self.tile_cap = tile_cap
        self.frames = frames or FrameChoice()
        self.seed = seed

    def encode_entry(
        self, entry: Entry, annotations: Annotations, *, source: int, images: Images
    ) -> Sample | Reject:
        """The sample of one entry of an annotation file, or why there is none.

        Args:
            entry: the record as it stands in the file.
            annotations: the file that it is from.
            source: number of the file.
            images: how far images are read.
        """
        try:
            fields = entry.fields()
            annotations.keep.check_fields(fields)
            difficulty = annotations.difficulty_of(fields)
            record = parse_record(
                fields, root=annotations.root, files=entry.files, prompt=annotations.prompt
            )
            limits = {"max_tiles": annotations.max_tiles, "keep": annotations.keep}
            return self.encode(
                record,
                source=source,
                line=entry.number,
                images=images,
                difficulty=difficulty,
                **limits,
            )
        except RejectError as error:
            return Reject(
                file=annotations.path, line=entry.number, reason=error.reason, detail=error.detail
            )

    def encode(
        self,
        record: Record,
        *,
        source: int,
        line: int,
        images: Images,
        max_tiles: int | None = None,
        keep: Filter | None = None,
        difficulty: float = 0.0,
    ) -> Sample:
        """The sample of a record. Nothing is cut off: what is too long is refused.

        Args:
            record: conversations, images and video.
            source: number of the annotation file.
            line: number of the record in it, from 1.
            images: how far images are read.
            max_tiles: stands in for the tiling's, for a source that has its own.
            keep: what the record must be like.
            difficulty: of the record.

        Raises:
            RejectError: the record cannot become a sample, with the reason.
        """
        keep = keep or Filter()
        turns = record.conversations
        if record.video:
            rng = np.random.default_rng((self.seed, source, line))
            pictures = self._frames(record.video, images, rng)
            turns = show_frames(turns, len(pictures))
        else:
            pictures = tuple(
                self._image(file, len(record.images), max_tiles, images, keep)
                for file in record.images
            )
        tiles = [picture.tiles for picture in pictures]
        if self.tile_cap is not None and sum(tiles) > self.tile_cap:
            raise RejectError(
                "too_many_tiles",
                f"{sum(tiles)} tiles of {len(tiles)} images, but a pack holds {self.tile_cap}: "
                f"lower {'--max_frames' if record.video else '--max_tiles'} or raise --tile_cap",
            )
        tokens, supervised = self.template.encode(turns, tiles)
        if len(tokens) > self.capacity:
            raise RejectError(
                "too_long",
                f"{len(tokens)} tokens, {sum(tiles) * self.template.features_per_tile} of them for"
                f" {sum(tiles)} tiles, but a pack holds {self.capacity}: raise --capacity or lower"
                f" {'--max_frames' if record.video else '--max_tiles'}",
            )
        keep.check_length(len(tokens))
        return Sample(
            tokens=tokens,
            supervised=supervised,
            images=pictures,
            source=source,
            line=line,
            difficulty=difficulty,
        )

    def _image(
        self, file: MediaFile, images: int, max_tiles: int | None, how: Images, keep: Filter
    ) -> Image:
        """One of a record's ``images`` images."""
        try:
            with open_media(file) as opened:
                encoded = b"" if how is Images.HEADER else opened.read()
                width, height = read_size(opened if how is Images.HEADER else encoded)
            if how is Images.DECODE:
                check_pixels(encoded)
            columns, rows = self.tiling.grid(width, height, images, max_tiles)
        except OSError as error:
            raise RejectError("missing_image", f"{file.path}: {error.strerror or error}") from None
        except ValueError as error:
            raise RejectError("unreadable_image", f"{file.path}: {error}") from None
        keep.check_image(width, height)
        return Image(
            encoded=encoded if how is Images.LOAD else b"",
            width=width,
            height=height,
            columns=columns,
            rows=rows,
            tiles=self.tiling.count(columns, rows),
        )

    def _frames(self, video: Video, how: Images, rng: np.random.Generator) -> tuple[Image, ...]:
        """The chosen frames of a video, a tile each."""
        try:
            places = self.frames.choose(frame_times(video.file), video.clip, rng)
            if how is Images.HEADER:
                return tuple(
                    Image(encoded=b"", width=0, height=0, columns=1, rows=1, tiles=1)
                    for _ in places
                )
            load_decoders()
            frames = read_frames(video.file, places, self.tiling.tile_size, self.tiling.pad_colour)
            for frame in frames if how is Images.DECODE else ():
                check_pixels(frame.encoded)
        except OSError as error:
            raise RejectError(
                "missing_video", f"{video.file.path}: {error.strerror or error}"
            ) from None
        except RejectError as error:
            raise RejectError(error.reason, f"{video.file.path}: {error.detail}") from None
        except ValueError as error:
            raise RejectError("unreadable_video", f"{video.file.path}: {error}") from None
        return tuple(
            Image(
                encoded=frame.encoded if how is Images.LOAD else b"",
                width=frame.width,
                height=frame.height,
                columns=1,
                rows=1,
                tiles=1,
            )
            for frame in frames
        )
