"""What a packing took from each source."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.data.packing.plan import PackPlan
from megavlm.data.packing.scan import Scan
from megavlm.data.packing.settings import Job
from megavlm.data.packing.write_shards import SourceTotals
from megavlm.data.records.reject import Reject
from megavlm.io.record_file import RecordFile

SHOWN_KEYS = 12


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The figures of one source, all of its files together.

    Args:
        name: of the source.
        records: read.
        rejected: of them, left out.
        samples: packed, repeats counted; of a pair, both.
        text_only: of them, without an image or a video.
        tokens: of the samples.
        share: of all tokens.
        tiles: of the samples.
        images: of the samples; None in a dry run.
        deep_images: of them, those with more than 8 bits a channel; 0 in a dry run.
        unread: how many records have a key that was not read, for each key.
    """

    name: str
    records: int
    rejected: int
    samples: int
    text_only: int
    tokens: int
    share: float
    tiles: int
    images: int | None
    deep_images: int
    unread: dict[str, int]

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        deep = f" ({self.deep_images:,} of more than 8 bits a channel)" if self.deep_images else ""
        images = "" if self.images is None else f"{self.images:,} images{deep} of "
        lines = [
            f"source    {self.name}: {self.records:,} records, {self.rejected:,} rejected;"
            f" {self.samples:,} samples ({self.text_only:,} without images) of {self.tokens:,}"
            f" tokens, {self.share:.1%} of all; {images}{self.tiles:,} tiles"
        ]
        if self.unread:
            most = sorted(self.unread.items(), key=lambda each: (-each[1], each[0]))
            keys = ", ".join(f"{name} {count:,}" for name, count in most[:SHOWN_KEYS])
            more = f" and {len(most) - SHOWN_KEYS} more" if len(most) > SHOWN_KEYS else ""
            lines.append(f"            keys not read: {keys}{more}")
        return lines


def report_sources(
    job: Job,
    scan: Scan,
    plan: PackPlan,
    late: Sequence[Reject],
    packed: Sequence[SourceTotals] | None,
) -> tuple[SourceReport, ...]:
    """Return the figures of each source, in the order of the meta file.

    Args:
        job: names the annotation files.
        scan: their records.
        plan: the samples that were to be packed.
        late: records that the second pass rejected.
        packed: what it wrote of each file; None: a dry run.
    """
    sources = job.sources
    taken = _planned(job, scan.rows, plan) if packed is None else packed
    all_tokens = max(1, sum(each.tokens for each in taken))
    lost = Counter(reject.source for reject in late)
    reports = []
    files: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        files.setdefault(source.name, []).append(index)
    for name, own in files.items():
        unread: Counter[str] = Counter()
        for index in own:
            unread.update(scan.sources[index].unread)
        counts = [scan.sources[index] for index in own]
        total = SourceTotals()
        for index in own:
            total.add(taken[index])
        figures = dataclasses.asdict(total)
        if packed is None:
            figures["images"] = None
        reports.append(
            SourceReport(
                name=name,
                records=sum(each.records for each in counts),
                rejected=sum(sum(each.rejects.values()) for each in counts)
                + sum(lost[index] for index in own),
                share=total.tokens / all_tokens,
                unread=dict(sorted(unread.items())),
                **figures,
            )
        )
    return tuple(reports)


def _planned(job: Job, rows: RecordFile, plan: PackPlan) -> list[SourceTotals]:
    """Return what would be packed of each source; nothing is known of its images. Tokens of pairs
    include what aligns the rejected ones.
    """
    sources = len(job.sources)
    of_row = 2 if job.preferences else 1
    times = np.bincount(plan.order, minlength=len(rows))
    source = rows["source"]

    def total(weights: np.ndarray) -> list[int]:
        return np.bincount(source, weights, sources).astype(np.int64).tolist()

    columns = {
        "samples": total(of_row * times),
        "text_only": total(np.where(rows["tiles"] == 0, of_row * times, 0)),
        "tokens": total(times * rows["tokens"]),
        "tiles": total(times * rows["tiles"]),
    }
    return [
        SourceTotals(**{name: column[index] for name, column in columns.items()})
        for index in range(sources)
    ]
