"""Packs on disk: ``packs-00000.bin`` holds the bytes, ``packs-00000.idx`` one record of fixed size a pack.

A pack is one block of the ``.bin`` file, which starts at a multiple of 64 bytes; its sections start at multiples of 8 bytes:

    tokens int32 [T] | supervised uint8 [T] | sample lengths int32 [N] | provenance [N] | image table [images] | encoded images

All numbers are little-endian. The ``.idx`` file is a header (magic, format version, sizes, and the record's fields as JSON) and then the
records, so an index of any size is a memory map. Shapes: T tokens of the pack, N samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megavlm.data.manifest import FILE_NAME, Manifest, Shard, Totals
from megavlm.data.sample import Sample

MAGIC = b"MVLMPACK"
VERSION = 1
BLOCK_ALIGNMENT_BYTES = 64
SECTION_ALIGNMENT_BYTES = 8
SHARD_BYTES = 32 * 2**30
REDUCTIONS = ("token", "sample", "square")

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
    ]
)
PROVENANCE = np.dtype([("line", "<i8"), ("source", "<i4"), ("reserved", "<i4")])
IMAGE = np.dtype(
    [
        ("offset", "<i8"),  # in the section of encoded images
        ("bytes", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("columns", "<i4"),
        ("rows", "<i4"),
        ("tiles", "<i4"),
        ("sample", "<i4"),  # place of its sample in the pack
    ]
)
# magic, version, header bytes, record bytes, description bytes, packs, bytes of the .bin file
HEADER = struct.Struct("<8sIIIIqq")
DESCRIPTION = json.dumps(RECORD.descr).encode()


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


HEADER_BYTES = round_up(HEADER.size + len(DESCRIPTION), BLOCK_ALIGNMENT_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sections:
    """Where the sections of a block start, in bytes from the block's start; ``encoded`` is also the size of all before the images."""

    supervised: int
    lengths: int
    provenance: int
    images: int
    encoded: int


def sections(tokens: int, samples: int, images: int) -> Sections:
    """The layout of a block; it follows from the pack's counts alone."""
    supervised = round_up(4 * tokens, SECTION_ALIGNMENT_BYTES)
    lengths = supervised + round_up(tokens, SECTION_ALIGNMENT_BYTES)
    provenance = lengths + round_up(4 * samples, SECTION_ALIGNMENT_BYTES)
    table = provenance + PROVENANCE.itemsize * samples
    return Sections(supervised=supervised, lengths=lengths, provenance=provenance, images=table, encoded=table + IMAGE.itemsize * images)


def pack_header(packs: int, bin_bytes: int) -> bytes:
    """The header of an ``.idx`` file."""
    header = HEADER.pack(MAGIC, VERSION, HEADER_BYTES, RECORD.itemsize, len(DESCRIPTION), packs, bin_bytes)
    return (header + DESCRIPTION).ljust(HEADER_BYTES, b"\0")


def sample_weights(supervised: np.ndarray) -> tuple[float, float, float]:
    """Sums of the loss weights of samples with ``supervised`` tokens each, for the reductions token, sample and square.

    A supervised token of a sample with n of them weighs 1 (token), 1/n (sample) or 1/sqrt(n) (square), so a sample weighs n, 1 or sqrt(n).
    """
    counts = supervised[supervised > 0].astype(np.float64)
    return float(counts.sum()), float(len(counts)), float(np.sqrt(counts).sum())


class Writer:
    """Writes packs one after the other, starts a new pair of files at ``shard_bytes``, and the manifest at the end.

    Args:
        folder: made if missing. Packs that an unfinished run left there are removed; a complete dataset is an error.
        capacity: tokens of a pack, each sample's length rounded up to ``alignment``.
        shard_bytes: a ``.bin`` file that has reached this size is followed by the next one.
        tile_cap: most tiles of a pack; None: any number.
        alignment: each sample will start at a multiple of this many tokens.

    Raises:
        FileExistsError: the folder holds a complete dataset.
        ValueError: the capacity is not a multiple of the alignment.
    """

    def __init__(
        self, folder: Path, capacity: int, shard_bytes: int = SHARD_BYTES, *, tile_cap: int | None = None, alignment: int = 1
    ) -> None:
        if capacity < 1 or alignment < 1 or capacity % alignment:
            raise ValueError(f"--capacity {capacity} is not a multiple of --alignment {alignment}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / FILE_NAME).exists():
            raise FileExistsError(f"{self.folder}: holds a complete packed dataset; give another --out or remove it")
        for path in self.folder.iterdir():
            if re.fullmatch(r"packs-\d{5,}\.(bin|idx)", path.name):
                path.unlink()
        self.capacity, self.shard_bytes, self.tile_cap, self.alignment = capacity, shard_bytes, tile_cap, alignment
        self._shards: list[Shard] = []
        self._sums = dict.fromkeys((entry.name for entry in dataclasses.fields(Totals)), 0)
        self._open_shard()

    def _open_shard(self) -> None:
        self._name = f"packs-{len(self._shards):05d}"
        # Both files stay open from pack to pack: close() and __exit__ close them.
        self._bin = open(self.folder / f"{self._name}.bin", "wb")  # noqa: SIM115
        self._idx = open(self.folder / f"{self._name}.idx", "wb")  # noqa: SIM115
        self._idx.write(pack_header(0, 0))
        self._packs = 0
        self._crc = 0

    def _close_shard(self) -> None:
        """Write the header, now that its counts are known, and put both files on the disk."""
        bin_bytes = self._bin.tell()
        header = pack_header(self._packs, bin_bytes)
        self._idx.seek(0)
        self._idx.write(header)
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        records = np.memmap(self.folder / f"{self._name}.idx", dtype=np.uint8, mode="r")
        self._shards.append(Shard(name=self._name, packs=self._packs, bin_bytes=bin_bytes, idx_crc32=zlib.crc32(records)))

    def write(self, samples: Sequence[Sample]) -> int:
        """Append one pack and return its id.

        Raises:
            ValueError: no samples, or more tokens or tiles than a pack may hold.
        """
        used = sum(round_up(len(sample.tokens), self.alignment) for sample in samples)
        tiles = sum(sample.tiles for sample in samples)
        if not samples or used > self.capacity or any(len(sample.tokens) == 0 for sample in samples):
            raise ValueError(
                f"a pack of {len(samples)} samples takes {used} tokens (aligned to {self.alignment}); "
                f"it must hold samples that are not empty and at most --capacity {self.capacity} tokens"
            )
        if self.tile_cap is not None and tiles > self.tile_cap:
            raise ValueError(f"a pack of {len(samples)} samples has {tiles} tiles, above --tile_cap {self.tile_cap}")
        if self._packs and self._bin.tell() >= self.shard_bytes:
            self._close_shard()
            self._open_shard()
        self._bin.write(bytes(-self._bin.tell() % BLOCK_ALIGNMENT_BYTES))
        block, record = pack_block(samples)
        record["offset"] = self._bin.tell()
        self._bin.write(block)
        self._idx.write(record.tobytes())
        self._packs += 1
        for name in self._sums:
            self._sums[name] += 1 if name == "packs" else int(record[name])
        return self._sums["packs"] - 1

    def close(self, manifest: Manifest) -> Manifest:
        """Complete the dataset: write ``manifest`` with the shards and totals of what was written, and return it.

        Raises:
            ValueError: the manifest's capacity, alignment or tile cap is not the one that the packs were written with.
        """
        for name in ("capacity", "alignment") + (("tile_cap",) if self.tile_cap is not None else ()):
            if getattr(manifest, name) != getattr(self, name):
                raise ValueError(f"manifest: {name} {getattr(manifest, name)}, but the packs were written with {getattr(self, name)}")
        self._close_shard()
        manifest = dataclasses.replace(manifest, shards=tuple(self._shards), totals=Totals(**self._sums))
        manifest.write(self.folder)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of the files; a folder that was not closed stays incomplete."""
        self._bin.close()
        self._idx.close()


def pack_block(samples: Sequence[Sample]) -> tuple[bytes, np.ndarray]:
    """The block of a pack, and its record in the index without the offset."""
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    images = [(place, image) for place, sample in enumerate(samples) for image in sample.images]
    layout = sections(int(lengths.sum()), len(samples), len(images))
    head = np.zeros(layout.encoded, np.uint8)
    count = int(lengths.sum())
    head[: 4 * count].view("<i4")[:] = np.concatenate([sample.tokens for sample in samples])
    head[layout.supervised : layout.supervised + count] = np.concatenate([sample.supervised for sample in samples])
    head[layout.lengths : layout.lengths + 4 * len(samples)].view("<i4")[:] = lengths
    provenance = head[layout.provenance : layout.images].view(PROVENANCE)
    provenance["source"] = [sample.source for sample in samples]
    provenance["line"] = [sample.line for sample in samples]
    table = head[layout.images :].view(IMAGE)
    parts, offset = [], 0
    for row, (place, image) in zip(table, images, strict=True):
        size = len(image.encoded)
        row["offset"], row["bytes"], row["sample"] = offset, size, place
        row["width"], row["height"], row["columns"], row["rows"] = image.width, image.height, image.columns, image.rows
        row["tiles"] = image.tiles
        parts += [image.encoded, bytes(-size % SECTION_ALIGNMENT_BYTES)]
        offset += round_up(size, SECTION_ALIGNMENT_BYTES)
    encoded = b"".join(parts)
    # The first token of a sample follows nothing inside it, so it is never a label and never counts.
    supervised = np.array([np.count_nonzero(sample.supervised[1:]) for sample in samples])
    record = np.zeros((), RECORD)
    record["bytes"] = len(head) + len(encoded)
    record["tokens"], record["samples"], record["images"] = count, len(samples), len(images)
    record["tiles"] = int(table["tiles"].sum())
    record["supervised"], record["longest"] = supervised.sum(), lengths.max()
    record["weight_token"], record["weight_sample"], record["weight_square"] = sample_weights(supervised)
    record["squared_lengths"] = np.square(lengths.astype(np.float64)).sum()
    record["crc_tokens"], record["crc_images"] = zlib.crc32(head), zlib.crc32(encoded)
    return head.tobytes() + encoded, record
