"""The offline job: annotation files and images become a packed dataset.

Two passes. The first measures all records, of images only their headers, and leaves out the bad
ones; then the packs are planned over all samples. The second encodes the samples again, with their
images' bytes, and writes them, a shard at a time. Of each sample 32 bytes are kept between the
passes, in a file. What is done stays in ``OUT.partial`` when the job is stopped; the same command
resumes it.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megavlm.data.packing.executors import EncoderSettings, build_encoder, ordered_map
from megavlm.data.packing.job_tokenizers import (
    TOKENIZER_NAME,
    context_token_id,
    end_token_id,
    load_own,
    load_qformer,
    save_both,
)
from megavlm.data.packing.media import Images
from megavlm.data.packing.plan import PackPlan, Samples, gather_samples, plan_packs
from megavlm.data.packing.reject_limit import (
    check_scan,
    check_shards,
    late_rejects,
    write_rejects,
)
from megavlm.data.packing.report import PackingFacts, Report, make_report
from megavlm.data.packing.scan import Scan, scan_records
from megavlm.data.packing.scan_again import read_rejects_again
from megavlm.data.packing.scan_state import STATE_NAME
from megavlm.data.packing.settings import Job
from megavlm.data.packing.shard_rows import shard_rows
from megavlm.data.packing.source_list import FILE_NAME as SOURCES_NAME
from megavlm.data.packing.source_list import write_sources
from megavlm.data.packing.source_report import report_sources
from megavlm.data.packing.work_folder import partial_folder, publish
from megavlm.data.packing.write_shards import (
    WORK_FILES,
    ShardTask,
    WrittenShard,
    WrittenShards,
    find_written,
    remove_shards,
    write_shard,
)
from megavlm.data.records.reject import Reject, count_unwanted
from megavlm.data.store.manifest import Level, Manifest, Source, Totals
from megavlm.data.store.pack_format import PackRules, complete
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER, fingerprint
from megavlm.io import atomic
from megavlm.io.progress import Progress

__all__ = ["Job", "pack_dataset", "plan_dataset"]
SCAN_NAME = "scan"
REJECTS_NAME = "rejects.jsonl"


def pack_dataset(job: Job) -> Report:
    """Pack a dataset, or resume, and return its figures. The folder ``job.out`` appears when it is
    complete, not before.

    Raises:
        FileNotFoundError: the tokenizer or an annotation file does not exist.
        FileExistsError: ``--out`` already holds something, or ``OUT.partial`` something else than
            this job.
        ValueError: a setting that cannot work, too many rejected records, no sample left, or an
            annotation file whose records cannot be counted.
    """
    start = time.monotonic()
    job.check()
    _tell_unused(job)
    tokenizer = load_own(job)
    words = load_qformer(job)
    identity = job.identity(fingerprint(tokenizer), fingerprint(words) if words else "")
    with partial_folder(
        job.partial, identity, flag=f"--out {job.out}", prepared=(TOKENIZER_NAME,)
    ) as folder:
        save_both(tokenizer, words, folder)
        settings = _settings(job, tokenizer, folder / TOKENIZER_NAME)
        scan = _scan(job, settings, folder)
        plan = _plan(job, _gather(job, scan))
        shards = _write_shards(job, settings, scan, plan, folder)
        late = late_rejects(shards)
        facts = {
            "tokenizer_fingerprint": settings.fingerprint,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "context_token_id": context_token_id(job, tokenizer),
            "pad_token_id": tokenizer.pad_token_id or 0,
            "end_token_id": end_token_id(job, tokenizer),
        }
        if words:
            facts |= {
                "qformer_fingerprint": fingerprint(words),
                "qformer_vocab_size": max(words.get_vocab().values()) + 1,
                "instruction_length": job.most_of_instruction,
            }
        manifest = complete(
            folder,
            _manifest(job, scan, plan, shards, late, facts),
            [(written.shard, written.totals) for written in shards],
        )
        samples = _gather(job, scan)
        report = _report(job, scan, samples, plan, late, shards, manifest.totals, start)
        write_rejects(folder / REJECTS_NAME, scan, late)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        (folder / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
        save_both(tokenizer, words, folder)  # again, in case it was removed in these hours
        publish(folder, Path(job.out), (SCAN_NAME, SOURCES_NAME, *WORK_FILES))
    job.rejects_path.unlink(missing_ok=True)  # of a run before, which had too many of them
    return report


def plan_dataset(job: Job) -> Report:
    """Return what packing a dataset would come to, without writing it; errors as in
    ``pack_dataset``.
    """
    start = time.monotonic()
    job.check()
    _tell_unused(job)
    job = dataclasses.replace(job, out="")
    tokenizer = load_own(job)
    with tempfile.TemporaryDirectory(prefix="megavlm-") as temporary:
        folder = Path(temporary)
        save_both(tokenizer, load_qformer(job), folder)
        scan = _scan(job, _settings(job, tokenizer, folder / TOKENIZER_NAME), folder)
        samples = _gather(job, scan)
        return _report(job, scan, samples, _plan(job, samples), [], None, None, start)


def _tell_unused(job: Job) -> None:
    """Say that a limit of tiles that sources have is for another tiling."""
    names = sorted({source.name for source in job.sources if source.max_tiles is not None})
    if names and job.tiling.mode != "dynamic":
        others = f" and {len(names) - 1} other sources" if len(names) > 1 else ""
        print(
            f"max_dynamic_patch of {names[0]}{others} has no effect: it is for --tiling dynamic,"
            f" and this is {job.tiling.mode}",
            file=sys.stderr,
        )


def _settings(job: Job, tokenizer: Any, folder: Path) -> EncoderSettings:
    """Return what workers build their encoders from; an unfit tokenizer is refused here, not by a
    worker.
    """
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
        deep_images=job.deep_images,
        windows=job.windows,
        truncate=job.truncate,
        qformer_tokenizer=str((folder / QFORMER_TOKENIZER).absolute())
        if job.qformer_tokenizer_folder
        else "",
        instruction_length=job.most_of_instruction,
        preferences=job.preferences,
        alignment=job.alignment,
    )
    build_encoder(settings)
    return settings


def _scan(job: Job, settings: EncoderSettings, folder: Path) -> Scan:
    """Run the first pass. Raises ValueError for too many rejected records."""
    scan_folder = folder / SCAN_NAME
    scan_folder.mkdir(exist_ok=True)
    if atomic.read_json(scan_folder / STATE_NAME) is None:
        remove_shards(folder)  # that may have been made of other rows
    ways = {
        "images": Images.DECODE if job.scan_pixels else Images.HEADER,
        "workers": job.workers,
        "executor": job.executor,
    }
    repaired = read_rejects_again(
        job.sources, settings, scan_folder, on_change=lambda: remove_shards(folder), **ways
    )
    if repaired:
        print(f"{repaired} records that were rejected can be read now", file=sys.stderr)
    scan = scan_records(job.sources, settings, scan_folder, **ways)
    check_scan(job, scan)
    deep = sum(source.deep_images for source in scan.sources)
    if deep and job.deep_images == "clip":
        print(
            f"warning: {deep} images have more than 8 bits a channel; training sees their values"
            " clipped to 0 ... 255 (--deep_images scale or reject)",
            file=sys.stderr,
        )
    turned = sum(source.turned_images for source in scan.sources)
    if turned and not job.tiling.exif_rotation:
        print(
            f"warning: {turned} images are not stored upright, as their EXIF says; training sees"
            " them as they are stored (--exif_rotation turns them)",
            file=sys.stderr,
        )
    return scan


def _gather(job: Job, scan: Scan) -> Samples:
    """Return the sizes of all samples."""
    return gather_samples(scan.rows, job.sources, job.alignment, job.seed, job.levels, job.near)


def _plan(job: Job, samples: Samples) -> PackPlan:
    """Decide which samples go into which pack."""
    with Progress("planning", "samples", len(samples.rows)):
        return plan_packs(
            samples,
            capacity=job.capacity,
            tile_cap=job.tile_cap,
            seed=job.seed,
            tile_multiple=job.tile_multiple,
        )


def _write_shards(
    job: Job, settings: EncoderSettings, scan: Scan, plan: PackPlan, folder: Path
) -> WrittenShards:
    """Run the second pass: write all shards but those that are finished already."""
    shards = WrittenShards(len(job.sources))
    for number in range(plan.shards):
        if (written := find_written(folder, number)) is not None:
            shards.add(number, written)
    missing = [number for number in range(plan.shards) if number not in shards]
    rules = PackRules(
        capacity=job.capacity,
        tile_cap=plan.tile_cap,
        alignment=job.alignment,
        preferences=job.preferences,
    )
    sources = write_sources(folder.absolute(), job.sources)

    def tasks() -> Iterator[ShardTask]:
        for number, rows in shard_rows(scan.rows, plan, missing):
            starts = plan.shard(number)
            yield ShardTask(
                settings=settings,
                sources=sources,
                folder=folder.absolute(),
                number=number,
                rules=rules,
                rows=rows,
                starts=starts - starts[0],
                decode_images=job.decode_images,
            )

    done = plan.packs - sum(len(plan.shard(number)) - 1 for number in missing)
    first_rejected = count_unwanted(scan.rejects)
    rejected = sum(len(written.rejects) for written in shards)
    written_bytes = sum(written.totals.bytes for written in shards)
    with Progress("writing", "packs", plan.packs, done) as progress:
        for number, written in zip(
            missing, ordered_map(write_shard, tasks(), job.workers, job.executor), strict=True
        ):
            shards.add(number, written)
            rejected += len(written.rejects)
            written_bytes += written.totals.bytes
            progress.add(
                len(plan.shard(number)) - 1, f"{written_bytes / 1e6:,.0f} MB, {rejected} rejected"
            )
            # The exact count looks at all rejects, and is made only if it may matter.
            if first_rejected + rejected > job.max_rejects * scan.records:
                check_shards(job, scan, shards)
    check_shards(job, scan, shards)
    return shards


def _report(
    job: Job,
    scan: Scan,
    samples: Samples,
    plan: PackPlan,
    late: list[Reject],
    shards: WrittenShards | None,
    totals: Totals | None,
    start: float,
) -> Report:
    """Return the figures of the packing."""
    reasons = Counter(scan.rejects) + Counter(reject.reason for reject in late)
    facts = PackingFacts(
        out=job.out,
        records=scan.records,
        packed_records=scan.packable - len(late),
        rejects=dict(sorted(reasons.items())),
        sources=report_sources(job, scan, plan, late, shards and shards.sources),
        capacity=job.capacity,
        seed=job.seed,
        tile_multiple=job.tile_multiple,
        levels=_levels(plan, shards or ()),
        preferences=job.preferences,
        totals=totals,
        seconds=time.monotonic() - start,
    )
    with Progress("reporting", "samples", len(samples.rows)):
        return make_report(samples, plan, facts)


def _levels(plan: PackPlan, shards: Iterable[WrittenShard]) -> tuple[Level, ...]:
    """Return the levels of difficulty, without the packs that could not be written."""
    lost_packs = [
        number * plan.packs_per_shard + pack
        for number, written in enumerate(shards)
        for pack in written.lost_packs
    ]
    return plan.levels_without(lost_packs)


def _manifest(
    job: Job,
    scan: Scan,
    plan: PackPlan,
    shards: WrittenShards,
    late: list[Reject],
    tokenizer_facts: dict[str, Any],
) -> Manifest:
    """Return the manifest of the dataset, without shards and totals."""
    reasons = Counter(scan.rejects) + Counter(reject.reason for reject in late)
    default = chat_format(job.template).system_message
    return Manifest(
        **tokenizer_facts,
        template=job.template,
        system_message=default if job.system_message is None else job.system_message,
        image_size=job.tiling.tile_size,
        features_per_tile=job.features_per_tile,
        min_tiles=job.tiling.min_tiles,
        max_tiles=job.tiling.max_tiles,
        thumbnail=job.tiling.thumbnail,
        tiling=job.tiling.mode,
        image_limit=job.tiling.limit,
        min_pixels=job.tiling.min_pixels,
        max_pixels=job.tiling.max_pixels,
        video=job.tiling.video,
        grids=job.tiling.grids if job.tiling.has_grids else (),
        exif_rotation=job.tiling.exif_rotation,
        pixel_mean=job.tiling.pixel_mean,
        pixel_std=job.pixel_std,
        resample=job.tiling.resample,
        capacity=job.capacity,
        tile_cap=plan.tile_cap,
        alignment=job.alignment,
        seed=job.seed,
        preferences=job.preferences,
        sources=tuple(
            Source(
                name=source.name,
                annotations=source.path,
                root=source.root,
                records=counts.records,
                samples=taken.samples,
                repeat_time=source.repeat_time,
                augment=source.augment,
            )
            for source, counts, taken in zip(job.sources, scan.sources, shards.sources, strict=True)
        ),
        levels=_levels(plan, shards),
        rejects=dict(sorted(reasons.items())),
    )
