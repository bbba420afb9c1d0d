"""The figures of a packing, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from megavlm.data.load_imbalance import expected_peak
from megavlm.data.packing.best_fit import CapTrial, cap_curve
from megavlm.data.packing.plan import PackPlan, Samples
from megavlm.data.packing.source_report import SourceReport
from megavlm.data.records.reject import REASONS
from megavlm.data.store.manifest import Level, Totals

BARS = 32


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The distribution of a whole number over the samples: ``counts[k]`` of them lie in
    ``[edges[k], edges[k + 1])``.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a packing.

    Args:
        out: folder of the dataset.
        written: whether the packs were written; a dry run only plans them.
        records: records read.
        packed_records: of them, those that are in packs.
        rejected: records left out.
        rejects: number of rejected records for each reason.
        samples: samples packed; a record that is taken k times is k samples.
        pairs: pairs of a chosen and a rejected sample, which all samples are; None: there are none.
        packs: packs written, or planned.
        capacity: tokens of a pack.
        tokens: tokens of all samples.
        supervised: tokens with a loss; None in a dry run.
        fill: share of the packs' capacity that holds tokens.
        images: images of all samples; None in a dry run.
        tiles: tiles of all images, thumbnails counted.
        tiles_per_pack_mean: mean over the packs.
        tiles_per_pack_max: largest over the planned packs.
        tile_cap: most tiles that a pack was allowed.
        levels: levels of difficulty, the easiest first.
        imbalance_512: load imbalance in tiles of 512 data-parallel ranks with random packs (max /
            mean - 1).
        bytes: size of the packs; None in a dry run.
        seconds: time that it took, since it was started last.
        sources: figures of each source.
        lengths: tokens of the samples, or of the pairs, aligned.
        tile_counts: tiles of the samples, or of the pairs.
        caps: what other tile caps would come to.
    """

    out: str
    written: bool
    records: int
    packed_records: int
    rejected: int
    rejects: dict[str, int]
    samples: int
    pairs: int | None
    packs: int
    capacity: int
    tokens: int
    supervised: int | None
    fill: float
    images: int | None
    tiles: int
    tiles_per_pack_mean: float
    tiles_per_pack_max: int
    tile_cap: int
    levels: tuple[Level, ...]
    imbalance_512: float
    bytes: int | None
    seconds: float
    lengths: Histogram
    tile_counts: Histogram
    caps: tuple[CapTrial, ...]
    sources: tuple[SourceReport, ...] = ()

    @property
    def samples_per_second(self) -> float:
        """Return the samples packed a second, all passes counted."""
        return self.samples / max(self.seconds, 1e-9)

    def to_json(self) -> str:
        """Return the figures as JSON."""
        return (
            json.dumps(
                {**dataclasses.asdict(self), "samples_per_second": self.samples_per_second},
                indent=2,
                ensure_ascii=False,
            )
            + "\n"
        )

    def text(self) -> str:
        """Return the figures as lines of text."""
        supervised = "" if self.supervised is None else f", {self.supervised:,} of them supervised"
        pairs = "" if self.pairs is None else f", in {self.pairs:,} pairs of chosen and rejected"
        size = "" if self.bytes is None else f", {self.bytes / 1e6:,.1f} MB"
        images = (
            f"{self.tiles:,} tiles"
            if self.images is None
            else f"{self.images:,} of {self.tiles:,} tiles"
        )
        lines = [
            f"packed    {self.out}" if self.written else "dry run   nothing is written",
            f"records   {self.records:,} read, {self.rejected:,} rejected",
            *(
                f"            {count:,} {reason}: {REASONS[reason]}"
                for reason, count in self.rejects.items()
            ),
            *(line for source in self.sources for line in source.lines()),
            f"samples   {self.samples:,} of {self.tokens:,} tokens{supervised}{pairs}",
            f"packs     {self.packs:,} of {self.capacity:,} tokens, {self.fill:.2%} filled{size}",
            *(
                f"level     {level.packs:,} packs of difficulty {level.easiest:g} to"
                f" {level.hardest:g}"
                for level in self.levels
            ),
            f"images    {images}",
            (
                f"tiles     {self.tiles_per_pack_mean:.2f} a pack on average,"
                f" {self.tiles_per_pack_max} at most (cap {self.tile_cap}); load imbalance of 512"
                f" ranks {self.imbalance_512:.1%}"
            ),
            *(
                f"cap {trial.tile_cap:>5} {trial.fill:.3%} of the best possible fill"
                + self._mark(trial)
                for trial in self.caps
            ),
            f"time      {self.seconds:.1f} s, {self.samples_per_second:,.0f} samples/s",
        ]
        return "\n".join(lines)

    def _mark(self, trial: CapTrial) -> str:
        return "  <- taken" if trial.tile_cap == self.tile_cap else ""


@dataclass(frozen=True, kw_only=True)
class PackingFacts:
    """What a report says besides the sizes of the samples and their packs.

    Args:
        out: folder of the dataset.
        records: records read.
        packed_records: of them, those that are in packs.
        rejects: number of the others for each reason.
        sources: figures of each source.
        capacity: tokens of a pack.
        seed: of the packer.
        tile_multiple: what a chosen tile cap is a multiple of.
        levels: of difficulty, with the packs of each that were written, or are planned.
        preferences: whether each sample has a rejected one beside it.
        totals: of what was written; None: a dry run.
        seconds: time that it took.
    """

    out: str
    records: int
    packed_records: int
    rejects: dict[str, int]
    sources: tuple[SourceReport, ...] = ()
    capacity: int
    seed: int
    tile_multiple: int = 1
    levels: tuple[Level, ...] = ()
    preferences: bool = False
    totals: Totals | None = None
    seconds: float


def make_report(samples: Samples, plan: PackPlan, facts: PackingFacts) -> Report:
    """Return the figures of a packing.

    Args:
        samples: all that were to be packed.
        plan: their packs.
        facts: everything else.
    """
    rejected = sum(facts.rejects.values())
    assert facts.records == facts.packed_records + rejected, facts
    totals = facts.totals
    known = _planned(samples, plan, facts.preferences) if totals is None else totals
    per_pack = _tiles_of_packs(samples, plan)
    return Report(
        out=facts.out,
        written=totals is not None,
        records=facts.records,
        packed_records=facts.packed_records,
        rejected=rejected,
        rejects=facts.rejects,
        samples=known.samples,
        pairs=known.samples // 2 if facts.preferences else None,
        packs=known.packs,
        capacity=facts.capacity,
        tokens=known.tokens,
        supervised=totals.supervised if totals else None,
        fill=known.tokens / (known.packs * facts.capacity),
        images=totals.images if totals else None,
        tiles=known.tiles,
        tiles_per_pack_mean=known.tiles / known.packs,
        tiles_per_pack_max=int(per_pack.max()),
        tile_cap=plan.tile_cap,
        levels=facts.levels,
        imbalance_512=expected_peak(per_pack) - 1.0,
        bytes=totals.bytes if totals else None,
        seconds=facts.seconds,
        lengths=_histogram(samples.tokens),
        tile_counts=_histogram(samples.tiles),
        caps=cap_curve(
            samples.tokens,
            samples.tiles,
            facts.capacity,
            seed=facts.seed,
            also=plan.tile_cap,
            multiple=facts.tile_multiple,
        ),
        sources=facts.sources,
    )


def _planned(samples: Samples, plan: PackPlan, preferences: bool) -> Totals:
    """Return what would be written."""
    count = len(plan.order) * (2 if preferences else 1)
    tokens, tiles = (int(values.sum(dtype=np.int64)) for values in (samples.tokens, samples.tiles))
    return Totals(packs=plan.packs, samples=count, tokens=tokens, tiles=tiles)


def _tiles_of_packs(samples: Samples, plan: PackPlan) -> np.ndarray:
    """Return the tiles of each planned pack."""
    by_row = np.zeros(int(samples.rows.max(initial=0)) + 1, samples.tiles.dtype)
    by_row[samples.rows] = samples.tiles
    return np.add.reduceat(by_row[plan.order], plan.starts[:-1])


def _histogram(values: np.ndarray) -> Histogram:
    """Count values in bars of equal, whole width."""
    low = int(values.min())
    high = int(values.max())
    width = max(1, -(-(high - low + 1) // BARS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
