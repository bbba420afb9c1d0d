"""The index of a packed dataset, ``packs.idx``: a header, then a record of fixed size for each
pack, so that any record is read without the others.

The header has magic, format version, sizes, and the record's fields as JSON. All numbers are
little-endian.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAGIC = b"MVLMPACK"
INDEX_NAME = "packs.idx"
BLOCK_ALIGNMENT_BYTES = 64

RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the block in the .bin file
        ("bytes", "<i8"),  # of the block
        ("tokens", "<i4"),
        ("samples", "<i4"),
        ("images", "<i4"),
        ("tiles", "<i4"),
        ("supervised", "<i4"),  # tokens with a loss
        ("longest", "<i4"),  # tokens of the longest sample
        ("weight_token", "<f8"),  # sums of loss weights
        ("weight_sample", "<f8"),
        ("weight_square", "<f8"),
        ("squared_lengths", "<f8"),  # sum of the samples' squared lengths: what attention costs
        ("crc_tokens", "<u4"),  # of all that lies before the encoded images
        ("crc_images", "<u4"),  # of the encoded images
        ("instructions", "<i4"),  # tokens of all instructions for a Q-Former
        ("longest_instruction", "<i4"),
        ("squared_tiles", "<f8"),  # sum of the images' squared tiles: what attention in them costs
    ]
)
IMAGE = np.dtype(
    [
        ("offset", "<i8"),  # in the section of encoded images
        ("bytes", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("columns", "<i4"),
        ("rows", "<i4"),
        ("tiles", "<i4"),
        ("sample", "<i4"),  # index of its sample in the pack
        ("frames", "<i4"),  # of a video that is one image in the text: it and those behind it
        ("interval", "<f4"),  # seconds from a pair of such frames to the next
    ]
)
_OLD_IMAGE = np.dtype(IMAGE.descr[:-2])
# magic, version, header bytes, record bytes, description bytes, packs
HEADER = struct.Struct("<8sIIIIq")


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class IndexForm:
    """How the index of one format version, and the tables of images in its packs, are written.

    Args:
        version: of the format.
        record: what the index says of a pack.
        image: what a pack says of an image.
    """

    version: int
    record: np.dtype
    image: np.dtype = IMAGE

    @cached_property
    def description(self) -> bytes:
        """The record's fields, as the header has them."""
        return json.dumps(self.record.descr).encode()

    @cached_property
    def header_bytes(self) -> int:
        """Size of the header."""
        return round_up(HEADER.size + len(self.description), BLOCK_ALIGNMENT_BYTES)

    def header(self, packs: int) -> bytes:
        """Return the header of an index of so many packs."""
        sizes = (self.header_bytes, self.record.itemsize, len(self.description))
        header = HEADER.pack(MAGIC, self.version, *sizes, packs)
        return (header + self.description).ljust(self.header_bytes, b"\0")


FORM = IndexForm(version=5, record=RECORD)
"""What is written."""
# Version 2 had no instructions, version 3 no squares of tiles, version 4 no frames in the tables.
FORMS = {
    2: IndexForm(version=2, record=np.dtype(RECORD.descr[:-3]), image=_OLD_IMAGE),
    3: IndexForm(version=3, record=np.dtype(RECORD.descr[:-1]), image=_OLD_IMAGE),
    4: IndexForm(version=4, record=RECORD, image=_OLD_IMAGE),
    FORM.version: FORM,
}
"""What is read, by the version."""


def as_records(rows: np.ndarray) -> np.ndarray:
    """Return records of any version as ``RECORD``; fields that the version lacks are 0."""
    return _as(rows, RECORD)


def as_images(rows: np.ndarray) -> np.ndarray:
    """Return a table of images of any version as ``IMAGE``."""
    found = _as(rows, IMAGE)
    if found is not rows:
        # Frames had no grid, and were counted in its place.
        is_frame = rows["columns"] == 0
        found["frames"] = np.where(is_frame, rows["rows"], 0)
        found["columns"][is_frame] = 1
        found["rows"][is_frame] = 1
    return found


def _as(rows: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Return rows with the fields that are ``wanted``, 0 where they lack one."""
    if rows.dtype == wanted:
        return rows
    found = np.zeros(rows.shape, wanted)
    for name in rows.dtype.names:
        found[name] = rows[name]
    return found


def read_header(path: str, start: bytes, packs: int) -> IndexForm:
    """Return the form of an index.

    Args:
        path: of the index, for messages.
        start: its first bytes, at least as many as the longest header.
        packs: what the manifest says.

    Raises:
        ValueError: this program cannot read it, or it is of another dataset.
    """
    if len(start) < HEADER.size or not start.startswith(MAGIC):
        raise ValueError(f"{path}: not an index of packs (it does not start with {MAGIC.decode()})")
    _, version, header_bytes, record_bytes, _, found = HEADER.unpack_from(start)
    if version not in FORMS:
        raise ValueError(
            f"{path}: format version {version}, but this megavlm reads"
            f" {', '.join(map(str, FORMS))}; update megavlm, or pack the dataset again"
        )
    form = FORMS[version]
    if len(start) < form.header_bytes:
        raise ValueError(
            f"{path}: ends inside its header; the file is cut off, copy or pack the dataset again"
        )
    description = start[HEADER.size : HEADER.size + len(form.description)]
    sizes = (header_bytes, record_bytes)
    if sizes != (form.header_bytes, form.record.itemsize) or description != form.description:
        raise ValueError(
            f"{path}: records of {record_bytes} bytes with other fields than those of"
            f" {form.record.itemsize} bytes that this megavlm reads; pack the dataset again"
        )
    if start[: form.header_bytes] != form.header(packs):
        raise ValueError(
            f"{path}: header says {found} packs, the manifest says {packs}; the files do not belong"
            " together"
        )
    return form
