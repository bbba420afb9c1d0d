"""Second pass of the packer: a worker encodes the samples of a shard's packs again, with their
images' bytes, and writes the shard.

A shard that is on the disk has a marker beside it, written last: a packing that goes on after it
was stopped keeps such shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from megavlm.data.images.decode import check_pixels
from megavlm.data.packing.encode import Images
from megavlm.data.packing.executors import EncoderSettings, build_encoder
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.open_files import open_entries
from megavlm.data.records.reject import Reject
from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Shard, Totals
from megavlm.data.store.pack_format import RECORD, PackRules, ShardWriter
from megavlm.io import atomic


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to be written.

    Args:
        settings: of the encoder.
        sources: annotation files.
        folder: where the shard goes.
        number: of the shard.
        rules: what a pack may hold.
        rows: of the survey, for the samples of the shard, pack after pack.
        starts: pack b holds ``rows[starts[b]:starts[b + 1]]``.
        decode_images: whether to see that each image can be decoded.
    """

    settings: EncoderSettings
    sources: tuple[Annotations, ...]
    folder: Path
    number: int
    rules: PackRules
    rows: np.ndarray
    starts: np.ndarray
    decode_images: bool


@dataclass(frozen=True, kw_only=True)
class LateReject:
    """A sample that the survey let through and that could not be packed: the number of its source,
    and why.
    """

    source: int
    reject: Reject


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A shard that is on the disk, what is in it, the samples that were left out of it, and planned
    packs that lost all of theirs.
    """

    shard: Shard
    totals: Totals
    rejects: tuple[LateReject, ...]
    lost_packs: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The content of the shard's marker."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def write_shard(task: ShardTask) -> WrittenShard:
    """Write a shard and its marker, in a worker. Samples that cannot be packed are left out, and so
    is a pack that loses all of its.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    rejects = []
    lost_packs = []
    with ShardWriter(task.folder, task.number, task.rules) as writer:
        for pack, (first, end) in enumerate(pairwise(task.starts.tolist())):
            samples = []
            for sample in encode_rows(task, task.rows[first:end]):
                if isinstance(sample, LateReject):
                    rejects.append(sample)
                else:
                    samples.append(sample)
            if samples:
                writer.write(samples)
            else:
                lost_packs.append(pack)
        shard, totals = writer.close()
    written = WrittenShard(
        shard=shard, totals=totals, rejects=tuple(rejects), lost_packs=tuple(lost_packs)
    )
    atomic.write_text(_marker(task.folder, task.number), written.to_json())
    return written


def find_written(folder: Path, number: int) -> WrittenShard | None:
    """Return a shard that a stopped packing left complete; None if its marker is absent or cut."""
    facts = atomic.read_json(_marker(folder, number))
    if facts is None:
        return None
    shard = Shard(**facts["shard"])
    sizes = {
        f"{shard.name}.bin": shard.bin_bytes,
        f"{shard.name}.records": shard.packs * RECORD.itemsize,
    }
    if any(
        not (folder / name).is_file() or (folder / name).stat().st_size != size
        for name, size in sizes.items()
    ):
        return None
    rejects = tuple(
        LateReject(source=entry["source"], reject=Reject(**entry["reject"]))
        for entry in facts["rejects"]
    )
    return WrittenShard(
        shard=shard,
        totals=Totals(**facts["totals"]),
        rejects=rejects,
        lost_packs=tuple(facts["lost_packs"]),
    )


def remove_markers(folder: Path, shards: int) -> None:
    """Remove what only a packing that goes on needs."""
    for number in range(shards):
        _marker(folder, number).unlink()


def encode_rows(task: ShardTask, rows: np.ndarray) -> Iterator[Sample | LateReject]:
    """The samples of the rows of one pack, in their order, with the bytes of their images."""
    found: list[Sample | LateReject | None] = [None] * len(rows)
    # In the order of the files, so that disks read forwards.
    places = sorted(
        range(len(rows)), key=lambda place: (rows["source"][place], rows["offset"][place])
    )
    for source, group in groupby(places, key=lambda place: int(rows["source"][place])):
        for place in group:
            found[place] = _encode_row(task, rows[place], source)
    yield from found


def _encode_row(task: ShardTask, row: np.ndarray, source: int) -> Sample | LateReject:
    """The sample of one row."""
    annotations = task.sources[source]
    line = int(row["line"])
    entry = next(open_entries(annotations.path).read(int(row["offset"]), line, 1), None)
    sample = entry and build_encoder(task.settings).encode_entry(
        entry, annotations, source=source, images=Images.LOAD
    )
    if not isinstance(sample, Sample) or (sample.length, sample.tiles) != (
        row["tokens"],
        row["tiles"],
    ):
        if isinstance(sample, Reject) and sample.reason.startswith("unreadable"):
            return LateReject(source=source, reject=sample)  # a video is looked into only now
        now = (
            f"{sample.length} tokens, {sample.tiles} tiles"
            if isinstance(sample, Sample)
            else f"{sample or 'gone'}"
        )
        detail = f"before: {row['tokens']} tokens, {row['tiles']} tiles; now: {now}"
        return LateReject(
            source=source,
            reject=Reject(file=annotations.path, line=line, reason="changed", detail=detail),
        )
    if task.decode_images:
        for number, image in enumerate(sample.images):
            try:
                check_pixels(image.encoded)
            except ValueError as error:
                detail = f"image {number} of the record: {error}"
                return LateReject(
                    source=source,
                    reject=Reject(
                        file=annotations.path, line=line, reason="unreadable_image", detail=detail
                    ),
                )
    return sample


def _marker(folder: Path, number: int) -> Path:
    return Path(folder) / f"packs-{number:05d}.json"
