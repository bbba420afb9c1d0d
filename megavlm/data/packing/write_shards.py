"""Second pass of the packer: a worker encodes the samples of a shard's packs again, with their
images' bytes, and writes the shard.

A finished shard has a marker beside it, written last: a packing that resumes keeps such shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from megavlm.data.images.decode import check_pixels
from megavlm.data.packing.encode import reject
from megavlm.data.packing.executors import EncoderSettings, build_encoder
from megavlm.data.packing.media import Images
from megavlm.data.packing.source_list import SourceList
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.readers import open_reader
from megavlm.data.records.reject import REPAIRABLE, Reject, RejectError
from megavlm.data.sample import Sample
from megavlm.data.store.index_format import RECORD
from megavlm.data.store.manifest import Shard, Totals
from megavlm.data.store.pack_format import PackRules, ShardWriter
from megavlm.io import atomic
from megavlm.io.typed_json import build

# Patterns of what only a packing that resumes needs beside the shards.
WORK_FILES = ("packs-*.json", "packs-*.records")
# Of documents that a worker keeps while it writes a shard.
DOCUMENT_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to be written.

    Args:
        settings: of the encoder.
        sources: lists the annotation files.
        folder: where the shard goes.
        number: of the shard.
        rules: what a pack may hold.
        rows: of the scan, for the samples of the shard, pack after pack.
        starts: pack b holds ``rows[starts[b]:starts[b + 1]]``.
        decode_images: whether to see that each image can be decoded.
    """

    settings: EncoderSettings
    sources: SourceList
    folder: Path
    number: int
    rules: PackRules
    rows: np.ndarray
    starts: np.ndarray
    decode_images: bool


@dataclass(kw_only=True)
class SourceTotals:
    """What of one source is in packs.

    Args:
        samples: repeats counted, and the rejected ones of pairs too.
        text_only: of them, without an image or a video.
        tokens: of the samples.
        tiles: of the samples; those that both samples of a pair show count once.
        images: of the samples, counted likewise.
        deep_images: of them, those with more than 8 bits a channel.
    """

    samples: int = 0
    text_only: int = 0
    tokens: int = 0
    tiles: int = 0
    images: int = 0
    deep_images: int = 0

    def count(self, sample: Sample) -> None:
        """Add a sample."""
        count = len(sample.answers)
        self.samples += count
        self.text_only += 0 if sample.tiles else count
        self.tokens += sum(answer.length for answer in sample.answers)
        self.tiles += sample.tiles
        self.images += len(sample.images)
        self.deep_images += sum(image.deep for image in sample.images)

    def add(self, other: SourceTotals) -> None:
        """Add what is in another shard."""
        self.samples += other.samples
        self.text_only += other.text_only
        self.tokens += other.tokens
        self.tiles += other.tiles
        self.images += other.images
        self.deep_images += other.deep_images


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A finished shard.

    Args:
        shard: its files.
        totals: what is in it.
        rejects: samples that the scan let through and that could not be packed.
        lost_packs: planned packs that lost all of their samples.
        sources: what is in it, by the number of the source.
    """

    shard: Shard
    totals: Totals
    rejects: tuple[Reject, ...]
    lost_packs: tuple[int, ...] = ()
    sources: dict[int, SourceTotals] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the content of the shard's marker."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


class WrittenShards:
    """The finished shards of a packing. What they hold of each source is added up when it comes: a
    shard of 60,000 samples has nearly as many sources if there are so many, and a packing may have
    16,384 shards.

    Args:
        sources: number of sources.

    Attributes:
        sources: what all shards hold of each.
    """

    def __init__(self, sources: int) -> None:
        self.sources = [SourceTotals() for _ in range(sources)]
        self._by_number: dict[int, WrittenShard] = {}

    def add(self, number: int, written: WrittenShard) -> None:
        """Add a shard; each is added once."""
        for source, totals in written.sources.items():
            self.sources[source].add(totals)
        self._by_number[number] = dataclasses.replace(written, sources={})

    def __contains__(self, number: int) -> bool:
        return number in self._by_number

    def __iter__(self) -> Iterator[WrittenShard]:
        """Yield the shards in their order, without what they hold of each source."""
        for number in sorted(self._by_number):
            yield self._by_number[number]


class Documents(OrderedDict[tuple[int, int], tuple[RawRecord, tuple[Sample, ...]]]):
    """Documents that were cut into windows, by source and offset, as their windows are in many
    packs of a shard. The latest are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0

    def keep(self, key: tuple[int, int], raw: RawRecord, samples: tuple[Sample, ...]) -> None:
        """Keep the samples of a record that is not there, and drop the oldest if all need too much
        memory.
        """
        self[key] = raw, samples
        self._bytes += _size(samples)
        while self._bytes > DOCUMENT_BYTES:
            self._bytes -= _size(self.popitem(last=False)[1][1])


def _size(samples: tuple[Sample, ...]) -> int:
    """Return the bytes of samples, roughly."""
    images = sum(len(image.encoded) for sample in samples for image in sample.images)
    return images + sum(5 * sample.length for sample in samples)


def write_shard(task: ShardTask) -> WrittenShard:
    """Write a shard and its marker, in a worker. Samples that cannot be packed are left out, and so
    is a pack that loses all of its samples.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    rejects = []
    lost_packs = []
    sources: dict[int, SourceTotals] = {}
    documents = Documents()
    with ShardWriter(task.folder, task.number, task.rules) as writer:
        for pack, (first, end) in enumerate(pairwise(task.starts.tolist())):
            samples = []
            for sample in encode_rows(task, task.rows[first:end], documents):
                if isinstance(sample, Reject):
                    rejects.append(sample)
                else:
                    samples.append(sample)
                    sources.setdefault(sample.source, SourceTotals()).count(sample)
            if samples:
                writer.write(samples)
            else:
                lost_packs.append(pack)
        shard, totals = writer.close()
    written = WrittenShard(
        shard=shard,
        totals=totals,
        rejects=tuple(rejects),
        lost_packs=tuple(lost_packs),
        sources=sources,
    )
    atomic.write_text(_marker(task.folder, task.number), written.to_json())
    return written


def find_written(folder: Path, number: int) -> WrittenShard | None:
    """Return a shard that a stopped packing has finished, or None. One that left out records for
    missing or damaged media is not finished: the files may have been restored.
    """
    path = _marker(folder, number)
    facts = atomic.read_json(path)
    try:
        written = None if facts is None else build(WrittenShard, facts, str(path))
    except ValueError:  # damaged: the shard is written again
        return None
    if written is None or any(each.reason in REPAIRABLE for each in written.rejects):
        return None
    sizes = {
        f"{written.shard.name}.bin": written.shard.bin_bytes,
        f"{written.shard.name}.records": written.shard.packs * RECORD.itemsize,
    }
    if any(
        not (folder / name).is_file() or (folder / name).stat().st_size != size
        for name, size in sizes.items()
    ):
        return None
    return written


def remove_shards(folder: Path) -> None:
    """Remove all shards of a stopped packing, since they were made of other rows. There may now be
    fewer: one that stayed would be in the dataset's folder, and no part of it.
    """
    # The markers first: a shard without one is written again.
    for pattern in ("packs-*.json", "packs-*.records", "packs-*.bin"):
        for path in Path(folder).glob(pattern):
            path.unlink()


def encode_rows(
    task: ShardTask, rows: np.ndarray, documents: Documents
) -> Iterator[Sample | Reject]:
    """Yield the samples of the rows of one pack, in their order, with the bytes of their images."""
    found: list[Sample | Reject | None] = [None] * len(rows)
    # In the order of the files, so that disks read forwards.
    order = np.lexsort((rows["offset"], rows["source"])).tolist()
    for source, group in groupby(order, key=lambda index: int(rows["source"][index])):
        for index in group:
            found[index] = _encode_row(task, rows[index], source, documents)
    yield from found


def _encode_row(
    task: ShardTask, row: np.void, source: int, documents: Documents
) -> Sample | Reject:
    """Return the sample of one row."""
    annotations = task.sources.read()[source]
    line = int(row["line"])
    offset = int(row["offset"])
    raw, samples = documents.get((source, offset), (None, ()))
    if raw is None:
        raw = next(open_reader(annotations.path).read(offset, line, 1), None)
        if raw is None:
            raw = RawRecord(offset=offset, number=line, content=b"")
            return reject(raw, annotations, source, _changed(row, "gone"))
        samples = build_encoder(task.settings).encode_raw(
            raw, annotations, source=source, images=Images.LOAD
        )
        if not isinstance(samples, Reject) and len(samples) > 1:
            documents.keep((source, offset), raw, samples)
    if isinstance(samples, Reject):
        if samples.reason in REPAIRABLE:
            return samples  # videos are decoded only now, and a file may have gone
        return reject(raw, annotations, source, _changed(row, str(samples)))
    window = int(row["window"])
    sample = next((each for each in samples if each.window == window), None)
    length = sample.extent(task.rules.alignment) if sample else 0
    if sample is None or (length, sample.tiles) != (row["tokens"], row["tiles"]):
        now = f"{length} tokens, {sample.tiles} tiles" if sample else "gone"
        return reject(raw, annotations, source, _changed(row, now))
    if task.decode_images:
        # All windows of a document, so that they are packed or rejected together.
        images = [image for each in samples for image in each.images]
        for number, image in enumerate(images):
            try:
                check_pixels(image.encoded)
            except ValueError as error:
                detail = f"{image.name} (image {number} of the record): {error}"
                return reject(raw, annotations, source, RejectError("unreadable_image", detail))
    return sample


def _changed(row: np.void, now: str) -> RejectError:
    """Return the reject of a record that is not what the scan measured."""
    return RejectError(
        "changed", f"before: {row['tokens']} tokens, {row['tiles']} tiles; now: {now}"
    )


def _marker(folder: Path, number: int) -> Path:
    return Path(folder) / f"packs-{number:05d}.json"
