"""What a packing took from each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.data.packing.plan import PackPlan
from megavlm.data.packing.scan import Scan
from megavlm.data.records.meta_file import Annotations
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
        samples: packed, repeats counted.
        text_only: of them, without an image or a video.
        tokens: of the samples.
        share: of all tokens.
        images: of its packable records, repeats not counted.
        deep_images: of them, those with more than 8 bits a channel.
        unread: how many records have a key that was not read, for each key.
    """

    name: str
    records: int
    rejected: int
    samples: int
    text_only: int
    tokens: int
    share: float
    images: int
    deep_images: int
    unread: dict[str, int]

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        deep = f", {self.deep_images:,} of more than 8 bits a channel" if self.deep_images else ""
        lines = [
            f"source    {self.name}: {self.records:,} records, {self.rejected:,} rejected;"
            f" {self.samples:,} samples ({self.text_only:,} without images) of {self.tokens:,}"
            f" tokens, {self.share:.1%} of all; {self.images:,} images{deep}"
        ]
        if self.unread:
            most = sorted(self.unread.items(), key=lambda each: (-each[1], each[0]))
            keys = ", ".join(f"{name} {count:,}" for name, count in most[:SHOWN_KEYS])
            more = f" and {len(most) - SHOWN_KEYS} more" if len(most) > SHOWN_KEYS else ""
            lines.append(f"            keys not read: {keys}{more}")
        return lines


def report_sources(
    sources: Sequence[Annotations], scan: Scan, plan: PackPlan, late: Sequence[Reject]
) -> tuple[SourceReport, ...]:
    """Return the figures of each source, in the order of the meta file.

    Args:
        sources: annotation files.
        scan: their records.
        plan: the samples that are taken.
        late: records that the second pass rejected.
    """
    samples, text_only, tokens = _taken(scan.rows, plan, late, len(sources))
    all_tokens = max(1, int(tokens.sum()))
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
        own_tokens = int(tokens[own].sum())
        reports.append(
            SourceReport(
                name=name,
                records=sum(each.records for each in counts),
                rejected=sum(sum(each.rejects.values()) for each in counts)
                + sum(lost[index] for index in own),
                samples=int(samples[own].sum()),
                text_only=int(text_only[own].sum()),
                tokens=own_tokens,
                share=own_tokens / all_tokens,
                images=sum(each.images for each in counts),
                deep_images=sum(each.deep_images for each in counts),
                unread=dict(sorted(unread.items())),
            )
        )
    return tuple(reports)


def _taken(
    rows: RecordFile, plan: PackPlan, late: Sequence[Reject], sources: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return samples, samples without tiles, and tokens of each source, int64 [sources] each."""
    times = np.bincount(plan.order, minlength=len(rows))
    source = rows["source"]
    if late:
        lost = [_record(np.int64(reject.source), np.int64(reject.line)) for reject in late]
        times[np.isin(_record(source, rows["line"]), lost)] = 0
    samples = np.bincount(source, weights=times, minlength=sources)
    text_only = np.bincount(
        source, weights=np.where(rows["tiles"] == 0, times, 0), minlength=sources
    )
    tokens = np.bincount(source, weights=times * rows["tokens"], minlength=sources)
    return samples.astype(np.int64), text_only.astype(np.int64), tokens.astype(np.int64)


def _record(source: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return a number for each record, int64, from the 32 bits of its source and of its line."""
    return source.astype(np.int64) << 32 | line
