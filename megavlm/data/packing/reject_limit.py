"""The list of rejected records, and the end of a job that has too many of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from megavlm.data.packing.job_state import reject_lines
from megavlm.data.packing.scan import Scan
from megavlm.data.packing.scan_state import shown_first
from megavlm.data.packing.settings import Job
from megavlm.data.packing.write_shards import WrittenShard
from megavlm.data.records.reject import Reject, count_unwanted


def late_rejects(shards: Iterable[WrittenShard]) -> list[Reject]:
    """Return the records that the second pass rejected, in the order of the files; one that is
    taken several times is one record.
    """
    by_record = {(each.source, each.offset): each for shard in shards for each in shard.rejects}
    return [by_record[key] for key in sorted(by_record)]


def check_scan(job: Job, scan: Scan) -> None:
    """Raise ValueError if the first pass rejected too many records, or none is left; the list of
    them is beside ``--out``.
    """
    if scan.records == 0:
        shares = any(source.repeat_time < 1 for source in job.sources)
        none = ", of which repeat_time below 1 takes a share, rounded down" if shares else ""
        raise ValueError(f"no records in {', '.join(source.path for source in job.sources)}{none}")
    rejected = count_unwanted(scan.rejects)
    if len(scan.rows) == 0 or rejected > job.max_rejects * scan.records:
        first = "" if scan.complete else "the first "
        raise _too_many(job, scan, rejected, f"{first}{scan.records}", scan.first_rejects, ())


def check_shards(job: Job, scan: Scan, shards: Iterable[WrittenShard]) -> None:
    """Raise ValueError if both passes together rejected too many records."""
    late = late_rejects(shards)
    rejected = count_unwanted(scan.rejects) + len(late)
    if rejected > job.max_rejects * scan.records or len(late) == scan.packable:
        first = shown_first([*scan.first_rejects, *late])
        raise _too_many(job, scan, rejected, str(scan.records), first, late)


def write_rejects(path: Path, scan: Scan, late: Iterable[Reject]) -> None:
    """Write the list of all rejected records."""
    shutil.copyfile(scan.rejects_path, path)
    with open(path, "ab") as file:
        file.write(reject_lines(late))


def _too_many(
    job: Job,
    scan: Scan,
    rejected: int,
    of: str,
    first: Sequence[Reject],
    late: Iterable[Reject],
) -> ValueError:
    """Write the list of rejected records, and return the error for too many of them."""
    # A dry run keeps nothing to resume from.
    remedy = "Repair the records or their media, or give a larger --max_rejects."
    if job.out:
        write_rejects(job.rejects_path, scan, late)
        remedy = (
            f"The list of them: {job.rejects_path}. With a larger --max_rejects, or after missing"
            " or damaged media were restored, the same command resumes; after a change of"
            f" annotation files or media that is to stay, remove {job.partial} first."
        )
    lines = "".join(f"\n  {reject}" for reject in first)
    filtered = sum(scan.rejects.values()) - count_unwanted(scan.rejects)
    others = f", and a filter left {filtered} out" if filtered else ""
    return ValueError(
        f"{rejected} of {of} records ({rejected / scan.records:.2%}) were rejected{others};"
        f" --max_rejects {job.max_rejects:g} allows {job.max_rejects:.2%}, and one must be left."
        f" {remedy} The first:{lines}"
    )
