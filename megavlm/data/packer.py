"""The offline job: annotation files and images become a packed dataset.

Two passes. The first measures all records and leaves out the bad ones, then the packs are planned over all samples; the second encodes the
samples again, pack by pack, with their images' bytes, and writes them. Only sizes are held in memory between the passes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from megavlm.data.encode import Images
from megavlm.data.manifest import Manifest, Source
from megavlm.data.packing import automatic_tile_cap, pack
from megavlm.data.packing_order import places_by_cost
from megavlm.data.progress import Progress
from megavlm.data.record import Annotations, read_lines
from megavlm.data.reject import Reject
from megavlm.data.report import Report
from megavlm.data.sample import Sample
from megavlm.data.store import Writer
from megavlm.data.survey import HOPELESS_RECORDS, Survey, survey
from megavlm.data.template import HF_CHAT_TEMPLATE, IMAGE_CONTEXT, NAME, SYSTEM_MESSAGE, add_special_tokens, fingerprint, load_tokenizer
from megavlm.data.tiling import Tiling
from megavlm.data.workers import EncoderSettings, build_encoder, ordered_map


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to pack, and how.

    Args:
        sources: annotation files.
        tokenizer: folder of the tokenizer; special tokens that it lacks are added to the copy in the dataset.
        out: folder of the dataset; missing or empty.
        capacity: tokens of a pack.
        features_per_tile: ``<IMG_CONTEXT>`` tokens of one tile.
        tiling: how images become tiles.
        tile_cap: most tiles of a pack; None: chosen from the data.
        alignment: each sample's length is rounded up to a multiple of this inside its pack.
        seed: fixes which of equal samples share a pack, and the order of packs.
        workers: processes that encode; 0: this one.
        max_rejects: largest share of the records that may be rejected.
        pixel_mean, pixel_std: how the model that the packs are for normalises its pixels.
        decode_images: whether the first pass decodes each image, so that none can stop a training run; otherwise it reads headers only.
    """

    sources: tuple[Annotations, ...]
    tokenizer: str
    out: str
    capacity: int
    features_per_tile: int
    tiling: Tiling
    tile_cap: int | None = None
    alignment: int = 1
    seed: int = 0
    workers: int = 0
    max_rejects: float = 0.01
    pixel_mean: tuple[float, float, float] = Manifest.pixel_mean
    pixel_std: tuple[float, float, float] = Manifest.pixel_std
    decode_images: bool = True

    def check(self) -> None:
        """Raise ValueError or FileExistsError, naming the flag, for settings that cannot work; touches no data."""
        least = {"capacity": 1, "features_per_tile": 1, "alignment": 1, "workers": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {bound}")
        if self.capacity % self.alignment:
            raise ValueError(f"--capacity {self.capacity}: must be a multiple of --alignment {self.alignment}")
        if self.tile_cap is not None and self.tile_cap < 0:
            raise ValueError(f"--tile_cap {self.tile_cap}: must be at least 0, or auto")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"--max_rejects {self.max_rejects}: must be a share between 0 and 1")
        out = Path(self.out)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"--out {out}: already holds something; give another folder, or remove it")
        if self.partial.exists():
            raise FileExistsError(
                f"--out {out}: {self.partial} was left by a packing that was stopped, or is still running; remove it first"
            )

    @property
    def partial(self) -> Path:
        """Folder that becomes ``out`` when it is complete."""
        out = Path(self.out)
        return out.with_name(out.name + ".partial")


def pack_dataset(job: Job) -> Report:
    """Pack a dataset, and return its figures. The folder ``job.out`` appears when it is complete, not before.

    Raises:
        FileNotFoundError: the tokenizer or an annotation file is not there.
        FileExistsError: ``--out`` already holds something.
        ValueError: a setting that cannot work, too many rejected records, no sample left, or a file that changed meanwhile.
    """
    start = time.monotonic()
    job.check()
    tokenizer = load_tokenizer(job.tokenizer)
    add_special_tokens(tokenizer)
    tokenizer.chat_template = HF_CHAT_TEMPLATE
    job.partial.mkdir(parents=True)
    try:
        folder = job.partial / "tokenizer"
        tokenizer.save_pretrained(folder)
        settings = EncoderSettings(
            tokenizer=str(folder),
            fingerprint=fingerprint(tokenizer),
            features_per_tile=job.features_per_tile,
            tiling=job.tiling,
            capacity=job.capacity,
            tile_cap=job.tile_cap,
        )
        build_encoder(settings)  # an unfit tokenizer is told here, not by a worker
        images = Images.DECODE if job.decode_images else Images.HEADER
        rejects = job.partial / "rejects.jsonl"
        with open(rejects, "w", encoding="utf-8") as file:
            found = survey(job.sources, settings, images=images, workers=job.workers, rejects_file=file)
        _check_rejects(job, found, rejects)
        plan = plan_packs(job, found)
        with Writer(job.partial, job.capacity, tile_cap=plan.tile_cap, alignment=job.alignment) as writer:
            _write_packs(job, settings, found, plan, writer)
            manifest = writer.close(
                _manifest(
                    job,
                    found,
                    plan,
                    tokenizer_fingerprint=settings.fingerprint,
                    vocab_size=max(tokenizer.get_vocab().values()) + 1,
                    context_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
                    pad_token_id=tokenizer.pad_token_id or 0,
                )
            )
        job.partial.rename(job.out)
    except BaseException:
        shutil.rmtree(job.partial, ignore_errors=True)
        raise
    return _report(job, found, plan, manifest, time.monotonic() - start)


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which samples go into which pack.

    Args:
        order: rows of the survey, pack after pack; a record that is taken k times is there k times.
        starts: int64 [packs + 1]; pack b holds ``order[starts[b]:starts[b + 1]]``.
        tile_cap: most tiles of a pack.
    """

    order: np.ndarray
    starts: np.ndarray
    tile_cap: int

    @property
    def packs(self) -> int:
        """Number of packs."""
        return len(self.starts) - 1


def plan_packs(job: Job, found: Survey) -> PackPlan:
    """Plan the packs over all samples, repeats counted, in an order that the seed fixes."""
    repeats = np.array([source.repeats for source in job.sources])
    rows = np.repeat(np.arange(len(found.rows), dtype=np.int32), repeats[found.rows["source"]])
    # Best fit takes equally long samples as they come: shuffled, so that neighbours in a file do not share a pack.
    np.random.default_rng((job.seed, 0)).shuffle(rows)
    tokens = -(-found.rows["tokens"][rows] // job.alignment) * job.alignment
    tiles = found.rows["tiles"][rows]
    tile_cap = automatic_tile_cap(tokens, tiles, job.capacity, seed=job.seed) if job.tile_cap is None else job.tile_cap
    packing = pack(tokens, tiles, capacity=job.capacity, tile_cap=tile_cap)
    squares = np.bincount(packing.bin_of, weights=np.square(tokens.astype(np.float64)), minlength=packing.bins)
    places = places_by_cost(squares, np.bincount(packing.bin_of, weights=tiles, minlength=packing.bins))
    order, starts = packing.members(job.seed, places)
    return PackPlan(order=rows[order], starts=starts, tile_cap=tile_cap)


@dataclass(frozen=True, kw_only=True)
class PackTask:
    """The samples of one pack, to be encoded by a worker: their ``rows`` of the survey."""

    settings: EncoderSettings
    sources: tuple[Annotations, ...]
    rows: np.ndarray


def load_pack(task: PackTask) -> list[Sample]:
    """Encode the samples of one pack, with the bytes of their images.

    Raises:
        ValueError: a record or an image is not what it was in the first pass.
    """
    encoder = build_encoder(task.settings)
    samples: list[Sample | None] = [None] * len(task.rows)
    places = sorted(range(len(task.rows)), key=lambda place: (task.rows["source"][place], task.rows["offset"][place]))
    for source, group in groupby(places, key=lambda place: int(task.rows["source"][place])):
        annotations = task.sources[source]
        for place in group:
            row = task.rows[place]
            _, text = next(read_lines(annotations.path, int(row["offset"]), 1), (0, b""))
            sample = encoder.encode_line(text, annotations, source=source, line=int(row["line"]), images=Images.LOAD)
            if isinstance(sample, Reject) or (sample.length, sample.tiles) != (row["tokens"], row["tiles"]):
                raise ValueError(
                    f"{annotations.path}:{row['line']}: the record or its images changed while they were packed "
                    f"({sample if isinstance(sample, Reject) else f'{sample.length} tokens, {sample.tiles} tiles'}; "
                    f"before: {row['tokens']} tokens, {row['tiles']} tiles)"
                )
            samples[place] = sample
    return samples


def _write_packs(job: Job, settings: EncoderSettings, found: Survey, plan: PackPlan, writer: Writer) -> None:
    """Second pass: encode and write the packs as planned."""

    def tasks() -> Iterator[PackTask]:
        for first, end in zip(plan.starts[:-1].tolist(), plan.starts[1:].tolist(), strict=True):
            yield PackTask(settings=settings, sources=job.sources, rows=found.rows[plan.order[first:end]])

    with Progress("writing", "packs", plan.packs) as progress:
        for samples in ordered_map(load_pack, tasks(), job.workers):
            writer.write(samples)
            progress.add(1)


def _check_rejects(job: Job, found: Survey, rejects: Path) -> None:
    """Raise ValueError for too many rejected records, after putting the list of them beside ``--out``."""
    records = sum(found.records)
    assert records == len(found.rows) + found.rejected, (records, len(found.rows), found.rejected)
    if records and len(found.rows) and found.rejected <= job.max_rejects * records:
        return
    if records == 0:
        raise ValueError(f"no records in {', '.join(source.path for source in job.sources)}")
    kept = Path(job.out).with_name(Path(job.out).name + ".rejects.jsonl")
    shutil.move(rejects, kept)
    first = "".join(f"\n  {reject}" for reject in found.first_rejects)
    hopeless = not len(found.rows) and records >= HOPELESS_RECORDS
    raise ValueError(
        f"{found.rejected} of {'the first ' if hopeless else ''}{records} records ({found.rejected / records:.2%}) were rejected; "
        f"--max_rejects allows {job.max_rejects:.2%}, and one must be left. The list of them: {kept}; the first:{first}"
    )


def _manifest(job: Job, found: Survey, plan: PackPlan, **tokenizer_facts: str | int) -> Manifest:
    """The manifest of the dataset, without shards and totals."""
    taken = np.bincount(found.rows["source"], minlength=len(job.sources)).tolist()
    return Manifest(
        **tokenizer_facts,
        template=NAME,
        system_message=SYSTEM_MESSAGE,
        image_size=job.tiling.tile_size,
        features_per_tile=job.features_per_tile,
        min_tiles=job.tiling.min_tiles,
        max_tiles=job.tiling.max_tiles,
        thumbnail=job.tiling.thumbnail,
        pixel_mean=job.pixel_mean,
        pixel_std=job.pixel_std,
        capacity=job.capacity,
        tile_cap=plan.tile_cap,
        alignment=job.alignment,
        seed=job.seed,
        sources=tuple(
            Source(
                name=source.name,
                annotations=source.path,
                root=source.root,
                records=records,
                samples=samples * source.repeats,
                repeat_time=source.repeat_time,
            )
            for source, records, samples in zip(job.sources, found.records, taken, strict=True)
        ),
        rejects=found.rejects,
    )


def _report(job: Job, found: Survey, plan: PackPlan, manifest: Manifest, seconds: float) -> Report:
    """The figures of a complete dataset."""
    totals = manifest.totals
    assert totals.samples == len(plan.order) and totals.packs == plan.packs, (totals, len(plan.order), plan.packs)
    tiles = np.add.reduceat(found.rows["tiles"][plan.order], plan.starts[:-1])
    return Report(
        out=job.out,
        records=sum(found.records),
        rejected=found.rejected,
        rejects=found.rejects,
        samples=totals.samples,
        packs=totals.packs,
        capacity=job.capacity,
        tokens=totals.tokens,
        supervised=totals.supervised,
        fill=totals.tokens / (totals.packs * job.capacity),
        images=totals.images,
        tiles=totals.tiles,
        tiles_per_pack_mean=totals.tiles / totals.packs,
        tiles_per_pack_max=int(tiles.max()),
        tile_cap=plan.tile_cap,
        bytes=totals.bytes,
        seconds=seconds,
    )
