"""From a record to a sample: images are looked at, tiles counted, the conversation becomes tokens."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from megavlm.data.media import check_pixels, read_size
from megavlm.data.record import Annotations, Record, parse_record
from megavlm.data.reject import Reject, RejectError
from megavlm.data.sample import Image, Sample
from megavlm.data.template import ChatTemplate
from megavlm.data.tiling import Tiling


class Images(Enum):
    """How far images are read.

    HEADER: their size only; a file whose end is missing passes. Samples then hold no bytes.
    DECODE: the pixels too, to see that they can be; samples hold no bytes.
    LOAD: the bytes are kept in the sample, and not decoded.
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
    """

    def __init__(self, template: ChatTemplate, tiling: Tiling, capacity: int, tile_cap: int | None = None) -> None:
        self.template = template
        self.tiling = tiling
        self.capacity = capacity
        self.tile_cap = tile_cap

    def encode_line(self, text: bytes, annotations: Annotations, *, source: int, line: int, images: Images) -> Sample | Reject:
        """The sample of one line of an annotation file, or why there is none.

        Args:
            text: the line, UTF-8.
            annotations: the file that it is from.
            source: number of the file.
            line: line in it, from 1.
            images: how far images are read.
        """
        try:
            record = parse_record(text, source=source, line=line, root=annotations.root)
            return self.encode(record, images=images, max_tiles=annotations.max_tiles)
        except RejectError as error:
            return Reject(file=annotations.path, line=line, reason=error.reason, detail=error.detail)

    def encode(self, record: Record, *, images: Images, max_tiles: int | None = None) -> Sample:
        """The sample of a record. Nothing is cut off: what is too long is refused.

        Args:
            record: conversations and paths of images.
            images: how far images are read.
            max_tiles: stands in for the tiling's, for a source that has its own.

        Raises:
            RejectError: the record cannot become a sample, with the reason.
        """
        pictures = tuple(self._image(Path(path), len(record.images), max_tiles, images) for path in record.images)
        tiles = [picture.tiles for picture in pictures]
        if self.tile_cap is not None and sum(tiles) > self.tile_cap:
            raise RejectError(
                "too_many_tiles",
                f"{sum(tiles)} tiles of {len(tiles)} images, but a pack holds {self.tile_cap}: lower --max_tiles or raise --tile_cap",
            )
        tokens, supervised = self.template.encode(record.conversations, tiles)
        if len(tokens) > self.capacity:
            raise RejectError(
                "too_long",
                f"{len(tokens)} tokens, {sum(tiles) * self.template.features_per_tile} of them for {sum(tiles)} tiles, "
                f"but a pack holds {self.capacity}: raise --capacity or lower --max_tiles",
            )
        return Sample(tokens=tokens, supervised=supervised, images=pictures, source=record.source, line=record.line)

    def _image(self, path: Path, images: int, max_tiles: int | None, how: Images) -> Image:
        """One of a record's ``images`` images."""
        try:
            encoded = b"" if how is Images.HEADER else path.read_bytes()
            width, height = read_size(path if how is Images.HEADER else encoded)
            if how is Images.DECODE:
                check_pixels(encoded)
            columns, rows = self.tiling.grid(width, height, images, max_tiles)
        except OSError as error:
            raise RejectError("missing_image", f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise RejectError("unreadable_image", f"{path}: {error}") from None
        return Image(
            encoded=encoded if how is Images.LOAD else b"",
            width=width,
            height=height,
            columns=columns,
            rows=rows,
            tiles=self.tiling.count(columns, rows),
        )
