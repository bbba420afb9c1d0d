"""The figures of a scoring."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megavlm.data.records.reject import REASONS
from megavlm.score.state import SourceState

# Scores are counted in bins of 1/10,000, from which everything else is derived.
_FINE = 10_000
_BIN = 200
_BAR = 40
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class SourceScores:
    """The figures of one source, all of its files together.

    Args:
        name: of the source.
        records: read.
        scored: of them, with a score.
        mean: of the scores.
    """

    name: str
    records: int
    scored: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a scoring.

    Args:
        out: folder of the scores.
        records: read.
        scored: of them, with a score.
        unscored: how many have none for each reason.
        near_duplicates: records with a score whose image an earlier one has; none: nobody looked.
        duplicates: cosine from which images count as the same; 0: nobody looked.
        mean, std: of the scores.
        percentiles: of the scores, to 1e-4.
        histogram: lower edge of each bin of width 0.02, and the records in it.
        sources: figures of each source.
        seconds: since the command started.
    """

    out: str
    records: int
    scored: int
    unscored: dict[str, int]
    near_duplicates: int | None
    duplicates: float
    mean: float
    std: float
    percentiles: dict[str, float]
    histogram: list[tuple[float, int]]
    sources: list[SourceScores]
    seconds: float

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def text(self) -> str:
        """Return the report for people."""
        unscored = sum(self.unscored.values())
        lines = [
            f"records   {self.records:,}: {self.scored:,} scored, {unscored:,} without a score",
            *(f"            {count:,} {name}: {REASONS[name]}" for name, count in self._reasons()),
            f"scores    mean {self.mean:.4f}, standard deviation {self.std:.4f}, "
            + ", ".join(f"{name}% below {value:.4f}" for name, value in self.percentiles.items()),
        ]
        most = max(count for _, count in self.histogram)
        lines += [
            f"  {edge:+.2f}  {'#' * round(_BAR * count / most):<{_BAR}}  {count:,}"
            for edge, count in self.histogram
        ]
        if self.near_duplicates is not None:
            lines.append(
                f"images    {self.near_duplicates:,} of {self.scored:,} are near that of an earlier"
                f" record (cosine of at least {self.duplicates:g})"
            )
        lines += [
            f"source    {one.name}: {one.records:,} records, {one.scored:,} scored,"
            f" mean {one.mean:.4f}"
            for one in self.sources
        ]
        return "\n".join([*lines, f"{self.out} written in {self.seconds:.0f} s"])

    def _reasons(self) -> Iterable[tuple[str, int]]:
        return sorted(self.unscored.items(), key=lambda each: (-each[1], each[0]))


class Tally:
    """Counts scores.

    Args:
        sources: number of annotation files.
    """

    def __init__(self, sources: int) -> None:
        self.fine = np.zeros(2 * _FINE + 1, np.int64)
        self.sums = np.zeros(sources)
        self.squares = 0.0

    def add(self, source: int, scores: np.ndarray) -> None:
        """Count scores of an annotation file."""
        wide = scores.astype(np.float64)
        bins = np.clip(np.floor(wide * _FINE), -_FINE, _FINE).astype(np.int64) + _FINE
        self.fine += np.bincount(bins, minlength=len(self.fine))
        self.sums[source] += wide.sum()
        self.squares += float((wide**2).sum())

    def histogram(self) -> list[tuple[float, int]]:
        """Return lower edges of bins and what they hold, from the first bin that holds any to the
        last.
        """
        counts = np.append(self.fine[:-1], 0)[:-1].reshape(-1, _BIN).sum(axis=1)
        counts[-1] += self.fine[-1]
        held = np.flatnonzero(counts)
        return [
            (round(index * _BIN / _FINE - 1, 2), int(counts[index]))
            for index in range(held[0], held[-1] + 1)
        ]

    def percentiles(self) -> dict[str, float]:
        """Return the score that so many percent lie below."""
        total = np.cumsum(self.fine)
        places = np.searchsorted(total, np.array(PERCENTILES) / 100 * total[-1])
        values = (places - _FINE) / _FINE
        return {str(name): float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def make_report(
    tally: Tally,
    sources: Sequence[SourceState],
    names: Sequence[str],
    *,
    out: str,
    duplicates: float,
    near_duplicates: int | None,
    seconds: float,
) -> Report:
    """Make the report.

    Args:
        tally: the scores.
        sources: what was read of each annotation file.
        names: of the source that each file belongs to.
        out, duplicates, near_duplicates, seconds: as of ``Report``.
    """
    scored = sum(one.scored for one in sources)
    reasons: Counter[str] = Counter()
    for one in sources:
        reasons.update(one.reasons)
    mean = float(tally.sums.sum()) / scored
    return Report(
        out=out,
        records=sum(one.records for one in sources),
        scored=scored,
        unscored=dict(sorted(reasons.items())),
        near_duplicates=near_duplicates,
        duplicates=duplicates,
        mean=mean,
        std=max(0.0, tally.squares / scored - mean**2) ** 0.5,
        percentiles=tally.percentiles(),
        histogram=tally.histogram(),
        sources=[_of_source(name, sources, names, tally.sums) for name in dict.fromkeys(names)],
        seconds=seconds,
    )


def _of_source(
    name: str, sources: Sequence[SourceState], names: Sequence[str], sums: np.ndarray
) -> SourceScores:
    """Return the figures of the source that has a name."""
    own = [index for index, each in enumerate(names) if each == name]
    scored = sum(sources[index].scored for index in own)
    return SourceScores(
        name=name,
        records=sum(sources[index].records for index in own),
        scored=scored,
        mean=float(sums[own].sum()) / max(1, scored),
    )
