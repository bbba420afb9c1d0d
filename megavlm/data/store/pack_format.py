"""Packs on disk: ``packs-00000.bin``, ... hold the bytes, ``packs.idx`` one record of fixed size a
pack, of all packs in their order.

A pack is one block of a ``.bin`` file, which starts at a multiple of 64 bytes; its sections start
at multiples of 8 bytes:

    tokens int32 [T] | supervised uint8 [T] | sample lengths int32 [N] | provenance [N] | image
    table [images] | instructions int32 [M] | encoded images

All numbers are little-endian. ``index_format`` has the index. Shapes: T tokens of the pack, N
samples, M tokens of their instructions for a Q-Former.

In a pack of preferences samples 2 i and 2 i + 1 are a pair, the chosen and the rejected one. The
images of a pair are stored once, for the chosen one; the placeholder tokens of both mean them.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megavlm.data.sample import Sample
from megavlm.data.store.index_format import (
    BLOCK_ALIGNMENT_BYTES,
    FORM,
    IMAGE,
    INDEX_NAME,
    RECORD,
    round_up,
)
from megavlm.data.store.manifest import Manifest, Shard, Totals
from megavlm.io import atomic
from megavlm.io.checksum import chunks, measure

SECTION_ALIGNMENT_BYTES = 8
REDUCTIONS = ("token", "sample", "square")

# ``instruction`` counts the tokens of the sample's instruction; it was always 0 before version 3.
PROVENANCE = np.dtype([("line", "<i8"), ("source", "<i4"), ("instruction", "<i4")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sections:
    """Where the sections of a block start, in bytes from the block's start; ``encoded`` is also the
    size of all before the images.
    """

    supervised: int
    lengths: int
    provenance: int
    images: int
    instructions: int
    encoded: int


def sections(
    tokens: int, samples: int, images: int, instructions: int = 0, image: np.dtype = IMAGE
) -> Sections:
    """Compute the layout of a block; it follows from the pack's counts, and from what it says of an
    ``image``.
    """
    supervised = round_up(4 * tokens, SECTION_ALIGNMENT_BYTES)
    lengths = supervised + round_up(tokens, SECTION_ALIGNMENT_BYTES)
    provenance = lengths + round_up(4 * samples, SECTION_ALIGNMENT_BYTES)
    table = provenance + PROVENANCE.itemsize * samples
    asked = table + image.itemsize * images
    return Sections(
        supervised=supervised,
        lengths=lengths,
        provenance=provenance,
        images=table,
        instructions=asked,
        encoded=asked + round_up(4 * instructions, SECTION_ALIGNMENT_BYTES),
    )


def sample_weights(supervised: np.ndarray) -> tuple[float, float, float]:
    """Sum the loss weights of samples with ``supervised`` tokens each, for the reductions token,
    sample and square.

    A supervised token of a sample with n of them weighs 1 (token), 1/n (sample) or 1/sqrt(n)
    (square), so a sample weighs n, 1 or sqrt(n).
    """
    counts = supervised[supervised > 0].astype(np.float64)
    return float(counts.sum()), float(len(counts)), float(np.sqrt(counts).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class PackRules:
    """What a pack may hold.

    Args:
        capacity: tokens of a pack, each sample's length rounded up to ``alignment``.
        tile_cap: most tiles of a pack; None: any number.
        alignment: each sample will start at a multiple of this many tokens.
        preferences: whether each sample has a rejected one beside it.

    Raises:
        ValueError: the capacity is not a multiple of the alignment.
    """

    capacity: int
    tile_cap: int | None = None
    alignment: int = 1
    preferences: bool = False

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.alignment < 1 or self.capacity % self.alignment:
            raise ValueError(
                f"--capacity {self.capacity} is not a multiple of --alignment {self.alignment}"
            )

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise ValueError where samples cannot make a pack."""
        self._check_pairs(samples)
        lengths = [answer.length for sample in samples for answer in sample.answers]
        used = sum(round_up(length, self.alignment) for length in lengths)
        tiles = sum(sample.tiles for sample in samples)
        if not samples or used > self.capacity or not all(lengths):
            raise ValueError(
                f"a pack of {len(samples)} samples takes {used} tokens (aligned to"
                f" {self.alignment}); it must hold samples that are not empty and at most"
                f" --capacity {self.capacity} tokens"
            )
        if self.tile_cap is not None and tiles > self.tile_cap:
            raise ValueError(
                f"a pack of {len(samples)} samples has {tiles} tiles, above --tile_cap"
                f" {self.tile_cap}"
            )

    def _check_pairs(self, samples: Sequence[Sample]) -> None:
        """Raise ValueError for samples alone in a pack of preferences, and the other way round."""
        alone = sum(sample.rejected is None for sample in samples)
        if alone != (0 if self.preferences else len(samples)):
            raise ValueError(
                f"a pack of {len(samples)} samples, of which {alone} have no rejected answer beside"
                f" them; in packs {'of' if self.preferences else 'without'} preferences"
                f" {'none' if self.preferences else 'all'} may be so"
            )
        for sample in samples if self.preferences else ():
            other = sample.rejected
            if other.images or len(other.instruction) or other.rejected is not None:
                raise ValueError("a rejected answer has images, or an instruction, of its own")
            if (other.source, other.line) != (sample.source, sample.line):
                raise ValueError("a rejected answer is of another record than the chosen one")


class ShardWriter:
    """Writes the packs of one shard: ``NAME.bin``, and their records as ``NAME.records``, which
    ``complete`` joins to the index.

    Args:
        folder: where the files go.
        number: of the shard.
        rules: what a pack may hold.
    """

    def __init__(self, folder: Path, number: int, rules: PackRules) -> None:
        self.folder = Path(folder)
        self.name = f"packs-{number:05d}"
        self.rules = rules
        # Both files stay open from pack to pack: close() and __exit__ close them.
        self._bin = open(self.folder / f"{self.name}.bin", "wb")  # noqa: SIM115
        self._records = open(self.folder / f"{self.name}.records", "wb")  # noqa: SIM115
        self._sums = dict.fromkeys((entry.name for entry in dataclasses.fields(Totals)), 0)

    @property
    def bytes(self) -> int:
        """Size of the shard so far."""
        return self._bin.tell()

    @property
    def packs(self) -> int:
        """Packs written so far."""
        return self._sums["packs"]

    def write(self, samples: Sequence[Sample]) -> None:
        """Append one pack; raises ValueError where the samples cannot make one."""
        self.rules.check(samples)
        self._bin.write(bytes(-self._bin.tell() % BLOCK_ALIGNMENT_BYTES))
        parts, record = pack_block(samples)
        record["offset"] = self._bin.tell()
        self._bin.writelines(parts)
        self._records.write(record.tobytes())
        for name in self._sums:
            self._sums[name] += 1 if name == "packs" else int(record[name])

    def close(self) -> tuple[Shard, Totals]:
        """Put the files on the disk, and say what is in them."""
        size = self._bin.tell()
        for file in (self._bin, self._records):
            atomic.sync_file(file)
            file.close()
        return Shard(name=self.name, packs=self.packs, bin_bytes=size), Totals(**self._sums)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the files; a shard that was not closed stays incomplete."""
        self._bin.close()
        self._records.close()


def complete(folder: Path, manifest: Manifest, shards: Sequence[tuple[Shard, Totals]]) -> Manifest:
    """Make a dataset of its shards: join their records to the index, then write the manifest, and
    return it with shards and totals. The records of the shards, ``NAME.records``, stay: a job that
    is stopped now does the same again.

    Raises:
        OSError: a file of a shard is gone, or not what was written.
    """
    for shard, _ in shards:
        path = folder / f"{shard.name}.bin"
        if path.stat().st_size != shard.bin_bytes:
            raise OSError(f"{path}: has changed since it was written; the same command resumes")
    packs = sum(shard.packs for shard, _ in shards)
    with open(folder / INDEX_NAME, "wb") as index:
        _, crc = measure(_index_chunks(folder, packs, [shard for shard, _ in shards], index))
        atomic.sync_file(index)
    sums = Counter()
    for _, totals in shards:
        sums.update(dataclasses.asdict(totals))
    manifest = dataclasses.replace(
        manifest, shards=tuple(shard for shard, _ in shards), idx_crc32=crc, totals=Totals(**sums)
    )
    manifest.write(folder)
    return manifest


def _index_chunks(
    folder: Path, packs: int, shards: Sequence[Shard], index: BinaryIO
) -> Iterator[bytes]:
    """Write the header and the records of all shards to the index, and yield what was written."""
    records = (chunks(folder / f"{shard.name}.records") for shard in shards)
    for chunk in chain([FORM.header(packs)], *records):
        index.write(chunk)
        yield chunk


def pack_block(samples: Sequence[Sample]) -> tuple[list[bytes], np.ndarray]:
    """Return the block of a pack in pieces, so that images are not copied to join them, and its
    index record without the offset. The rejected sample of a pair follows the chosen one.
    """
    samples = [answer for sample in samples for answer in sample.answers]
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    images = [(index, image) for index, sample in enumerate(samples) for image in sample.images]
    asked = np.array([len(sample.instruction) for sample in samples], np.int32)
    layout = sections(int(lengths.sum()), len(samples), len(images), int(asked.sum()))
    head = np.zeros(layout.encoded, np.uint8)
    count = int(lengths.sum())
    head[: 4 * count].view("<i4")[:] = np.concatenate([sample.tokens for sample in samples])
    head[layout.supervised : layout.supervised + count] = np.concatenate(
        [sample.supervised for sample in samples]
    )
    head[layout.lengths : layout.lengths + 4 * len(samples)].view("<i4")[:] = lengths
    provenance = head[layout.provenance : layout.images].view(PROVENANCE)
    provenance["source"] = [sample.source for sample in samples]
    provenance["line"] = [sample.line for sample in samples]
    provenance["instruction"] = asked
    instructions = head[layout.instructions :].view("<i4")[: asked.sum()]
    instructions[:] = np.concatenate([sample.instruction for sample in samples])
    table = head[layout.images : layout.instructions].view(IMAGE)
    parts = []
    offset = 0
    crc = 0
    for number, (index, image) in enumerate(images):
        size = len(image.encoded)
        # In the order of IMAGE.
        shape = (image.width, image.height, image.columns, image.rows)
        table[number] = (offset, size, *shape, image.tiles, index, image.frames, image.interval)
        for part in (image.encoded, bytes(-size % SECTION_ALIGNMENT_BYTES)):
            parts.append(part)
            crc = zlib.crc32(part, crc)
        offset += round_up(size, SECTION_ALIGNMENT_BYTES)
    # The first token of a sample follows nothing inside it, so it is never a label and never
    # counts.
    supervised = np.array([np.count_nonzero(sample.supervised[1:]) for sample in samples])
    record = np.zeros((), RECORD)
    record["bytes"] = len(head) + offset
    record["tokens"] = count
    record["samples"] = len(samples)
    record["images"] = len(images)
    record["tiles"] = int(table["tiles"].sum())
    record["supervised"] = supervised.sum()
    record["longest"] = lengths.max()
    record["weight_token"], record["weight_sample"], record["weight_square"] = sample_weights(
        supervised
    )
    record["squared_lengths"] = np.square(lengths.astype(np.float64)).sum()
    record["squared_tiles"] = np.square(table["tiles"].astype(np.float64)).sum()
    record["instructions"] = asked.sum()
    record["longest_instruction"] = asked.max()
    record["crc_tokens"] = zlib.crc32(head)
    record["crc_images"] = crc
    return [head.tobytes(), *parts], record
