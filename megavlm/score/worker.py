"""What a worker process does: it embeds the images and texts of some records.

Shape letters: n pairs, E size of the embeddings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from megavlm.data.images.decode import check_pixels
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.encode import Encoder, reject
from megavlm.data.packing.media import Images
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import OffsetRange, RawRecord
from megavlm.data.records.readers import open_reader
from megavlm.data.records.record import IMAGE_PLACEHOLDER, Record, Turn
from megavlm.data.records.reject import Reject, RejectError
from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Manifest, Source
from megavlm.data.store.memory_reader import MemoryReader
from megavlm.score.state import ROW
from megavlm.score.towers import Towers, find_towers

# More than any pair has; templates cut texts.
_CAPACITY = 2**20


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a process builds its encoders from.

    Args:
        model, tokenizer, precision: as of ``find_towers``.
        batch: most pairs that are embedded at once.
        keeps_embeddings: whether those of the images are returned.
    """

    model: str
    tokenizer: str
    precision: str
    batch: int
    keeps_embeddings: bool


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Records of one annotation file.

    Args:
        settings: of the process.
        annotations: the file.
        source: its index.
        records: where they are.
    """

    settings: WorkerSettings
    annotations: Annotations
    source: int
    records: OffsetRange


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The result of a task.

    Args:
        task: its task.
        rows: of type ``ROW``, one for each record with a score.
        last_line: line, row or number of the last record.
        images: embeddings of the rows' images, float16 [rows, E]; [0, E] if they are not kept.
        rejects: records without a score.
        reasons: how many of them there are for each reason.
    """

    task: ScoreTask
    rows: np.ndarray
    last_line: int
    images: np.ndarray
    rejects: list[Reject]
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What a process needs for all its tasks."""

    towers: Towers
    encoder: Encoder
    manifest: Manifest


@lru_cache(maxsize=1)
def _ready(settings: WorkerSettings) -> _Ready:
    """Build the encoders of this process."""
    model = find_towers(settings.model, settings.tokenizer, settings.precision)
    template = model.template()
    tiling = model.tiling()
    vision = model.architecture.vision
    manifest = Manifest(
        tokenizer_fingerprint="",
        vocab_size=model.architecture.language.vocab_size,
        context_token_id=-1,
        pad_token_id=template.tokenizer.pad_token_id or 0,
        template=model.usage.template,
        image_size=tiling.tile_size,
        features_per_tile=0,
        max_tiles=1,
        tiling=tiling.mode,
        pixel_mean=vision.pixel_mean,
        pixel_std=vision.pixel_std,
        resample=vision.resample,
        capacity=_CAPACITY,
        tile_cap=settings.batch,
    )
    return _Ready(
        towers=Towers(model),
        encoder=Encoder(template, tiling, _CAPACITY),
        manifest=manifest,
    )


def close(settings: WorkerSettings) -> None:
    """Forget the encoders, if this process has built any."""
    if _ready.cache_info().currsize:
        _ready(settings).towers.close()
        _ready.cache_clear()


def score(task: ScoreTask) -> Scored:
    """Score the records of a task."""
    ready = _ready(task.settings)
    extent = task.records
    numbers: list[int] = []
    rejects: list[Reject] = []
    pairs: list[Sample] = []
    count = 0
    last = 0
    for raw in open_reader(task.annotations.path).read(
        extent.offset, extent.number, extent.records
    ):
        count += 1
        last = raw.number
        found = _pairs(raw, task, ready.encoder)
        if isinstance(found, Reject):
            rejects.append(found)
            continue
        pairs += found
        numbers += [raw.number] * len(found)
    if count != extent.records:
        raise ValueError(
            f"{task.annotations.path}: {count} records from number {extent.number} on, but"
            f" {extent.records} when it was opened; the file has changed meanwhile"
        )
    lines, similar, images = _embed(ready, task, pairs, np.array(numbers, np.int64))
    if not np.isfinite(similar).all():
        line = lines[~np.isfinite(similar)][0]
        raise ValueError(
            f"{task.annotations.path}: the similarity of record {line} is not a number; look at the"
            " weights of --model, or take --precision float32"
        )
    rows = np.zeros(len(lines), ROW)
    rows["line"] = lines
    rows["score"] = similar
    return Scored(
        task=task,
        rows=rows,
        last_line=last,
        images=images.astype(np.float16),
        rejects=rejects,
        reasons=dict(Counter(one.reason for one in rejects)),
    )


def _pairs(raw: RawRecord, task: ScoreTask, encoder: Encoder) -> list[Sample] | Reject:
    """Return each image of a record with its text, or why it has no score."""
    annotations = task.annotations
    try:
        record = parse_record(
            raw.fields(), root=annotations.root, files=raw.files, prompt=annotations.prompt
        )
        turn = Turn(role="pretrain", text=_text(record))
        found = []
        for image in record.images:
            one = Record(conversations=(turn,), images=(image,))
            (sample,) = encoder.encode(one, source=0, line=raw.number, images=Images.LOAD)
            try:
                check_pixels(sample.images[0].encoded)
            except ValueError as error:
                raise RejectError("unreadable_image", f"{image.path}: {error}") from None
            found.append(sample)
        return found
    except RejectError as error:
        return reject(raw, annotations, task.source, error)
    except OverflowError as error:
        large = RejectError("conversation", f"a number that is too large: {error}")
        return reject(raw, annotations, task.source, large)


def _text(record: Record) -> str:
    """Return what a record says about its images: its answers, or the text that is learned as a
    whole.
    """
    if record.videos:
        raise RejectError("no_pair", f"{len(record.videos)} videos; only images have a similarity")
    said = [
        turn.text.replace(IMAGE_PLACEHOLDER, " ").strip()
        for turn in record.conversations
        if turn.role in ("gpt", "pretrain") and turn.learned
    ]
    text = " ".join(filter(None, said))
    if not record.images or not text:
        raise RejectError("no_pair", f"{len(record.images)} images and {len(text)} letters of text")
    return text


def _embed(
    ready: _Ready, task: ScoreTask, pairs: Sequence[Sample], lines: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lines of records, the mean similarity of each one's images to its text, float32
    [records], and the mean of the images' embeddings, of length one [records, E].

    Args:
        ready: this process's encoders.
        task: that the pairs belong to.
        pairs: each image with its text.
        lines: int64 [n], of the record of each pair, ascending.
    """
    size = ready.towers.chunk.architecture.contrastive.size
    embedded = [np.zeros((2, 0, size), np.float32)]
    embedded += list(_batches(ready, task, pairs))
    images, texts = np.concatenate(embedded, axis=1)
    found, starts, counts = np.unique(lines, return_index=True, return_counts=True)
    if not len(found):
        return found, np.zeros(0, np.float32), images
    similar = np.add.reduceat((images * texts).sum(axis=1), starts) / counts
    if not task.settings.keeps_embeddings:
        return found, similar, images[:0]
    sums = np.add.reduceat(images, starts)
    return found, similar, sums / np.linalg.norm(sums, axis=1, keepdims=True)


def _batches(ready: _Ready, task: ScoreTask, pairs: Sequence[Sample]) -> Iterator[np.ndarray]:
    """Yield embeddings of pairs, float32 [2, n, E], a batch at a time."""
    size = task.settings.batch
    source = Source(name=task.annotations.name, annotations=task.annotations.path)
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        manifest = replace(
            ready.manifest, capacity=sum(one.length for one in some), sources=(source,)
        )
        packs = PackedDataset(MemoryReader([some], manifest, task.annotations.path))
        yield ready.towers.embed(packs.batch(0, 0, BatchOptions(reduction="sample"))).numpy()
