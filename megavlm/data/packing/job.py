"""The offline job: annotation files and images become a packed dataset.

Two passes. The first measures all records, of images only their headers, and leaves out the bad
ones; then the packs are planned over all samples. The second encodes the samples again, with their
images' bytes, and writes them, a shard at a time. Of each record 22 bytes are kept between the
passes, in a file. What is done stays in ``OUT.partial`` when the job is stopped; the same command
goes on with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.executors import EncoderSettings, Executor, build_encoder, ordered_map
from megavlm.data.packing.plan import PackPlan, Samples, gather_samples, plan_packs
from megavlm.data.packing.report import Report, make_report
from megavlm.data.packing.scan import HOPELESS_RECORDS, REJECTS_NAME, SHOWN_REJECTS, Survey, survey
from megavlm.data.packing.work_folder import JOB_NAME, LOCK_NAME, partial_folder
from megavlm.data.packing.write_shards import (
    LateReject,
    ShardTask,
    WrittenShard,
    find_written,
    remove_markers,
    write_shard,
)
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.reject import Reject, count_unwanted
from megavlm.data.store.manifest import FORMAT_VERSION, Manifest, Source
from megavlm.data.store.pack_format import PackRules, complete
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import (
    IMAGE_CONTEXT,
    add_special_tokens,
    fingerprint,
    first_tokens,
    load_tokenizer,
)
from megavlm.io import atomic
from megavlm.io.progress import Progress

TOKENIZER_NAME = "tokenizer"
SURVEY_NAME = "survey"
# What may be other when a stopped job goes on: it changes no byte of the result.
FREE_SETTINGS = ("out", "workers", "executor", "max_rejects")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to pack, and how.

    Args:
        sources: annotation files.
        tokenizer: folder of the tokenizer; special tokens that it lacks are added to the copy in
            the dataset.
        out: folder of the dataset; missing or empty.
        capacity: tokens of a pack.
        features_per_tile: ``<IMG_CONTEXT>`` tokens of one tile.
        template: name of the conversation template.
        system_message: what a conversation without a system turn begins with; None: the template's
            own.
        tiling: how images become tiles.
        pixel_std: what the model divides red, green and blue by; the mean is the tiling's.
        frames: how frames of videos are chosen.
        tile_cap: most tiles of a pack; None: chosen from the data.
        tile_multiple: what the cap is a multiple of where it is chosen.
        alignment: each sample's length is rounded up to a multiple of this inside its pack.
        levels: levels of difficulty that records are cut into; 0: one for each difficulty.
        seed: fixes which of equal samples share a pack, and the order of packs.
        workers: processes that encode; 0: this one (with Ray: as many as the cluster has cores).
        executor: where they run.
        max_rejects: largest share of the records that may be rejected.
        decode_images: whether each image is decoded when it is packed, so that none can stop a
            training run.
    """

    sources: tuple[Annotations, ...]
    tokenizer: str
    out: str
    capacity: int
    features_per_tile: int
    tiling: Tiling
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: FrameChoice = field(default_factory=FrameChoice)
    template: str = DEFAULT
    system_message: str | None = None
    tile_cap: int | None = None
    tile_multiple: int = 1
    alignment: int = 1
    levels: int = 0
    seed: int = 0
    workers: int = 0
    executor: Executor = "processes"
    max_rejects: float = 0.01
    decode_images: bool = True

    def check(self) -> None:
        """Raise ValueError or FileExistsError, naming the flag, for settings that cannot work;
        touches no data.
        """
        least = {
            "capacity": 1,
            "features_per_tile": 1,
            "alignment": 1,
            "tile_multiple": 1,
            "levels": 0,
            "workers": 0,
            "seed": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {bound}")
        chat_format(self.template)
        if self.capacity % self.alignment:
            raise ValueError(
                f"--capacity {self.capacity}: must be a multiple of --alignment {self.alignment}"
            )
        if self.levels and all(source.difficulty is None for source in self.sources):
            raise ValueError(
                f"--levels {self.levels}: no source has a difficulty; give --difficulty, or"
                " difficulty in each entry of --meta"
            )
        if self.tile_cap is not None and self.tile_cap < 0:
            raise ValueError(f"--tile_cap {self.tile_cap}: must be at least 0, or auto")
        if self.tile_cap is not None and self.tile_multiple > 1:
            raise ValueError(
                f"--tile_multiple {self.tile_multiple}: goes with --tile_cap auto; --tile_cap"
                f" {self.tile_cap} is taken as it is"
            )
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"--max_rejects {self.max_rejects}: must be a share between 0 and 1")
        out = Path(self.out)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(
                f"--out {out}: already holds something; give another folder, or remove it"
            )

    @property
    def partial(self) -> Path:
        """Folder that becomes ``out`` when it is complete."""
        out = Path(self.out)
        return out.with_name(out.name + ".partial")

    def identity(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """What the result depends on, as JSON: settings, the state of the annotation files, the
        tokenizer and the format.
        """
        settings = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in (*FREE_SETTINGS, "sources", "tokenizer")
        }
        files = [os.stat(source.path) for source in self.sources]
        sources = [
            {**dataclasses.asdict(source), "bytes": found.st_size, "modified": found.st_mtime_ns}
            for source, found in zip(self.sources, files, strict=True)
        ]
        return {
            **settings,
            "sources": sources,
            "tokenizer": tokenizer_fingerprint,
            "format": FORMAT_VERSION,
        }


def pack_dataset(job: Job) -> Report:
    """Pack a dataset, or go on with it, and return its figures. The folder ``job.out`` appears when
    it is complete, not before.

    Raises:
        FileNotFoundError: the tokenizer or an annotation file is not there.
        FileExistsError: ``--out`` already holds something, or ``OUT.partial`` something else than
            this job.
        ValueError: a setting that cannot work, too many rejected records, or no sample left.
    """
    start = time.monotonic()
    job.check()
    tokenizer = _tokenizer(job)
    with partial_folder(
        job.partial, job.identity(fingerprint(tokenizer)), flag=f"--out {job.out}"
    ) as folder:
        tokenizer.save_pretrained(folder / TOKENIZER_NAME)
        settings = _settings(job, tokenizer, folder / TOKENIZER_NAME)
        found = _survey(job, settings, folder / SURVEY_NAME)
        samples = _gather(job, found)
        plan = _plan(job, samples)
        del samples  # gathered again for the report; meanwhile it would only take memory
        shards = _write_shards(job, settings, found, plan, folder)
        left_out = _left_out(shards)
        facts = {
            "tokenizer_fingerprint": settings.fingerprint,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "context_token_id": tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        manifest = complete(
            folder,
            _manifest(job, found, plan, shards, left_out, facts),
            [(written.shard, written.totals) for written in shards],
        )
        report = make_report(
            _gather(job, found),
            plan,
            out=job.out,
            records=sum(found.records),
            packed_records=len(found.rows) - len(left_out),
            rejects=manifest.rejects,
            capacity=job.capacity,
            seed=job.seed,
            tile_multiple=job.tile_multiple,
            totals=manifest.totals,
            seconds=time.monotonic() - start,
        )
        _tidy(folder, plan.shards, left_out, report)
        atomic.publish(folder, Path(job.out))
    return report


def plan_dataset(job: Job) -> Report:
    """What packing a dataset would come to, without writing it; errors as in ``pack_dataset``."""
    start = time.monotonic()
    job.check()
    tokenizer = _tokenizer(job)
    with tempfile.TemporaryDirectory(prefix="megavlm-") as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder / TOKENIZER_NAME)
        found = _survey(
            job, _settings(job, tokenizer, folder / TOKENIZER_NAME), folder / SURVEY_NAME
        )
        samples = _gather(job, found)
        plan = _plan(job, samples)
        return make_report(
            samples,
            plan,
            out=job.out,
            records=sum(found.records),
            packed_records=len(found.rows),
            rejects=found.rejects,
            capacity=job.capacity,
            seed=job.seed,
            tile_multiple=job.tile_multiple,
            totals=None,
            seconds=time.monotonic() - start,
        )


def _tokenizer(job: Job):
    """The tokenizer, with all that the dataset's copy of it needs."""
    tokenizer = load_tokenizer(job.tokenizer)
    add_special_tokens(tokenizer)
    tokenizer.chat_template = chat_format(job.template).hf_template(
        system_message=job.system_message, bos=bool(first_tokens(tokenizer))
    )
    return tokenizer


def _settings(job: Job, tokenizer, folder: Path) -> EncoderSettings:
    """What workers build their encoders from; an unfit tokenizer is told here, not by a worker."""
    settings = EncoderSettings(
        tokenizer=str(folder.absolute()),
        fingerprint=fingerprint(tokenizer),
        template=job.template,
        system_message=job.system_message,
        features_per_tile=job.features_per_tile,
        tiling=job.tiling,
        frames=job.frames,
        seed=job.seed,
        capacity=job.capacity,
        tile_cap=job.tile_cap,
    )
    build_encoder(settings)
    return settings


def _survey(job: Job, settings: EncoderSettings, folder: Path) -> Survey:
    """First pass. Raises ValueError for too many rejected records, after putting the list of them
    beside ``--out``.
    """
    folder.mkdir(exist_ok=True)
    found = survey(job.sources, settings, folder, workers=job.workers, executor=job.executor)
    records = sum(found.records)
    assert records == len(found.rows) + found.rejected, (records, len(found.rows), found.rejected)
    if records == 0:
        raise ValueError(f"no records in {', '.join(source.path for source in job.sources)}")
    hopeless = len(found.rows) == 0 and records >= HOPELESS_RECORDS
    rejected = count_unwanted(found.rejects)
    if len(found.rows) == 0 or rejected > job.max_rejects * records:
        kept = Path(job.out).with_name(Path(job.out).name + ".rejects.jsonl")
        shutil.copyfile(folder / REJECTS_NAME, kept)
        raise _too_many(
            job,
            rejected,
            f"{'the first ' if hopeless else ''}{records}",
            records,
            found.first_rejects,
            kept,
        )
    return found


def _too_many(
    job: Job, rejected: int, of: str, records: int, first: tuple[Reject, ...], listed: Path
) -> ValueError:
    """The error for too many rejected records."""
    lines = "".join(f"\n  {reject}" for reject in first)
    return ValueError(
        f"{rejected} of {of} records ({rejected / records:.2%}) were rejected; --max_rejects allows"
        f" {job.max_rejects:.2%}, and one must be left. The list of them: {listed}. With a larger"
        " --max_rejects the same command goes on; after a change to the files, remove"
        f" {job.partial} first. The first:{lines}"
    )


def _gather(job: Job, found: Survey) -> Samples:
    """The sizes of all samples."""
    return gather_samples(found.rows, job.sources, job.alignment, job.seed, job.levels)


def _plan(job: Job, samples: Samples) -> PackPlan:
    """Which samples go into which pack."""
    return plan_packs(
        samples,
        capacity=job.capacity,
        tile_cap=job.tile_cap,
        seed=job.seed,
        tile_multiple=job.tile_multiple,
    )


def _write_shards(
    job: Job, settings: EncoderSettings, found: Survey, plan: PackPlan, folder: Path
) -> list[WrittenShard]:
    """Second pass: all shards, those that are on the disk already left as they are."""
    shards = {number: find_written(folder, number) for number in range(plan.shards)}
    missing = [number for number, written in shards.items() if written is None]
    rules = PackRules(capacity=job.capacity, tile_cap=plan.tile_cap, alignment=job.alignment)

    def tasks() -> Iterator[ShardTask]:
        for number in missing:
            starts = plan.shard(number)
            yield ShardTask(
                settings=settings,
                sources=job.sources,
                folder=folder.absolute(),
                number=number,
                rules=rules,
                rows=found.rows[plan.order[starts[0] : starts[-1]]],
                starts=starts - starts[0],
                decode_images=job.decode_images,
            )

    done = plan.packs - sum(len(plan.shard(number)) - 1 for number in missing)
    rejected = sum(len(written.rejects) for written in shards.values() if written)
    written_bytes = sum(written.totals.bytes for written in shards.values() if written)
    with Progress("writing", "packs", plan.packs, done) as progress:
        for number, written in zip(
            missing, ordered_map(write_shard, tasks(), job.workers, job.executor), strict=True
        ):
            shards[number] = written
            rejected += len(written.rejects)
            written_bytes += written.totals.bytes
            progress.add(
                len(plan.shard(number)) - 1, f"{written_bytes / 1e6:,.0f} MB, {rejected} rejected"
            )
            if rejected:
                _check_left_out(job, found, [each for each in shards.values() if each])
    finished = [shards[number] for number in range(plan.shards)]
    _check_left_out(job, found, finished)
    return finished


def _left_out(shards: list[WrittenShard]) -> dict[tuple[int, int], LateReject]:
    """The records that the second pass rejected, by source and line; one that is taken several
    times is one record.
    """
    return {(late.source, late.reject.line): late for written in shards for late in written.rejects}


def _check_left_out(job: Job, found: Survey, shards: list[WrittenShard]) -> None:
    """Raise ValueError where both passes together rejected too many records."""
    left_out = _left_out(shards)
    records = sum(found.records)
    rejected = count_unwanted(found.rejects) + len(left_out)
    if rejected > job.max_rejects * records or len(left_out) == len(found.rows):
        kept = Path(job.out).with_name(Path(job.out).name + ".rejects.jsonl")
        shutil.copyfile(job.partial / SURVEY_NAME / REJECTS_NAME, kept)
        _append_rejects(kept, left_out)
        first = tuple(late.reject for late in left_out.values())[:SHOWN_REJECTS]
        raise _too_many(job, rejected, str(records), records, first, kept)


def _append_rejects(path: Path, left_out: dict[tuple[int, int], LateReject]) -> None:
    """Add the records that the second pass rejected to a list of rejects."""
    with open(path, "a", encoding="utf-8") as file:
        for _, late in sorted(left_out.items()):
            file.write(json.dumps(dataclasses.asdict(late.reject), ensure_ascii=False) + "\n")


def _tidy(
    folder: Path, shards: int, left_out: dict[tuple[int, int], LateReject], report: Report
) -> None:
    """Leave in the folder what belongs to a dataset."""
    rejects = folder / REJECTS_NAME
    shutil.copyfile(folder / SURVEY_NAME / REJECTS_NAME, rejects)
    _append_rejects(rejects, left_out)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
    remove_markers(folder, shards)
    shutil.rmtree(folder / SURVEY_NAME)
    for name in (JOB_NAME, LOCK_NAME):
        (folder / name).unlink()


def _manifest(
    job: Job,
    found: Survey,
    plan: PackPlan,
    shards: list[WrittenShard],
    left_out: dict[tuple[int, int], LateReject],
    tokenizer_facts: dict[str, Any],
) -> Manifest:
    """The manifest of the dataset, without shards and totals."""
    taken = np.bincount(found.rows["source"][plan.order], minlength=len(job.sources)).tolist()
    lost = Counter(late.source for written in shards for late in written.rejects)
    lost_packs = [
        number * plan.packs_per_shard + pack
        for number, written in enumerate(shards)
        for pack in written.lost_packs
    ]
    reasons = Counter(found.rejects) + Counter(late.reject.reason for late in left_out.values())
    return Manifest(
        **tokenizer_facts,
        template=job.template,
        system_message=(
            chat_format(job.template).system_message
            if job.system_message is None
            else job.system_message
        ),
        image_size=job.tiling.tile_size,
        features_per_tile=job.features_per_tile,
        min_tiles=job.tiling.min_tiles,
        max_tiles=job.tiling.max_tiles,
        thumbnail=job.tiling.thumbnail,
        tiling=job.tiling.mode,
        pixel_mean=job.tiling.pixel_mean,
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
                samples=samples - lost[number],
                repeat_time=source.repeat_time,
                augment=source.augment,
            )
            for number, (source, records, samples) in enumerate(
                zip(job.sources, found.records, taken, strict=True)
            )
        ),
        levels=plan.levels_without(lost_packs),
        rejects=dict(sorted(reasons.items())),
    )
