"""What is in a packed dataset, as figures for people and for programs. Everything comes from the
manifest and the index.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from megavlm.data.load_imbalance import RANKS, expected_peak
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Reader

COLUMNS = (
    "tokens",
    "tiles",
    "samples",
    "images",
    "supervised",
    "longest",
    "squared_lengths",
    "bytes",
)
PERCENTILES = (1, 10, 50, 90, 99)
HISTOGRAM_ROWS = 12
HISTOGRAM_WIDTH = 50


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one figure is spread over the packs.

    Args:
        mean, min, max: over all packs.
        percentiles: value below which that percentage of packs lies.
        bar_edges: edges of the histogram's bars.
        bars: packs in each bar.
    """

    mean: float
    min: float
    max: float
    percentiles: dict[int, float]
    bar_edges: tuple[float, ...]
    bars: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The figures of a packed dataset.

    Args:
        folder: where it lies.
        manifest: its facts.
        fill: share of the packs' capacity that holds tokens of samples.
        supervised_share: share of these tokens that have a loss.
        packs_without_tiles: packs of text alone.
        load_imbalance: tiles of the slowest of 512 data-parallel ranks divided by their mean,
            averaged over random draws of packs; 0 if there are no tiles.
        spreads: spread of each figure over the packs.
        checked_packs: packs whose checksums were verified; 0: not asked for.
    """

    folder: str
    manifest: Manifest
    fill: float
    supervised_share: float
    packs_without_tiles: int
    load_imbalance: float
    spreads: dict[str, Spread]
    checked_packs: int = 0

    def to_json(self) -> str:
        """All figures as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def overview_of(reader: Reader, *, check: bool = False) -> Overview:
    """Compute the figures of a dataset; with ``check``, read every byte and verify its checksum.

    Raises:
        ValueError: a checksum is wrong.
    """
    checked_packs = reader.check() if check else 0
    totals = reader.manifest.totals
    tiles = reader.index["tiles"]
    return Overview(
        folder=str(reader.folder),
        manifest=reader.manifest,
        fill=totals.tokens / (len(reader) * reader.manifest.capacity),
        supervised_share=totals.supervised / totals.tokens,
        packs_without_tiles=int(np.count_nonzero(tiles == 0)),
        load_imbalance=expected_peak(tiles),
        spreads={name: _spread(reader.index[name]) for name in COLUMNS},
        checked_packs=checked_packs,
    )


def to_text(overview: Overview) -> str:
    """Return the figures as a page of text."""
    return "\n".join([*_totals(overview), *_distributions(overview), *_manifest_lines(overview)])


def _totals(overview: Overview) -> list[str]:
    """Write the sums over the whole dataset."""
    manifest = overview.manifest
    totals = overview.manifest.totals
    pairs = (
        f" in {totals.samples // 2:,} pairs of chosen and rejected" if manifest.preferences else ""
    )
    mean_tiles = overview.spreads["tiles"].mean
    lines = [
        overview.folder,
        (
            f"  packs {totals.packs:,} of {manifest.capacity:,} tokens and up to"
            f" {manifest.tile_cap} tiles, in {len(manifest.shards)} shards,"
            f" {totals.bytes / 1e9:.3f} GB"
        ),
        (
            f"  samples {totals.samples:,}{pairs}, images {totals.images:,}, tiles"
            f" {totals.tiles:,}, tokens {totals.tokens:,}"
        ),
        f"  fill {overview.fill:.3%}, supervised {overview.supervised_share:.1%} of the tokens",
        (
            f"  packs without images {overview.packs_without_tiles:,}; mean tiles {mean_tiles:.2f},"
            f" load imbalance of {RANKS} ranks {overview.load_imbalance - 1:.1%}"
        ),
    ]
    lines += [
        f"  {level.packs:,} packs of difficulty {level.easiest:g} to {level.hardest:g}"
        for level in manifest.levels
    ]
    if overview.checked_packs:
        lines.append(f"  checksums of all {overview.checked_packs:,} packs are right")
    return lines


def _distributions(overview: Overview) -> list[str]:
    """Write how packs differ from each other."""
    titles = ("mean", "min", *(f"{p}%" for p in PERCENTILES), "max")
    lines = ["", f"  {'of a pack':<16}" + "".join(f"{title:>12}" for title in titles)]
    for name, spread in overview.spreads.items():
        values = (spread.mean, spread.min, *spread.percentiles.values(), spread.max)
        lines.append(
            f"  {name:<16}"
            + "".join(f"{value:>12,.{2 if value < 1000 and value % 1 else 0}f}" for value in values)
        )
    for name in ("tiles", "samples"):
        lines += ["", f"  {name} of a pack", *_histogram(overview.spreads[name])]
    return lines


def _manifest_lines(overview: Overview) -> list[str]:
    """Write the sources, the rejected records and the other facts of the manifest."""
    manifest = overview.manifest
    lines = ["", f"  {'source':<32}{'records':>12}{'samples':>12}{'repeat':>8}  annotations"]
    for source in manifest.sources:
        lines.append(
            f"  {source.name:<32}{source.records:>12,}{source.samples:>12,}{source.repeat_time:>8g}"
            f"  {source.annotations}"
        )
    lines += [
        "",
        "  rejected records: "
        + (
            ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejects.items()) or "none"
        ),
    ]
    lines += ["", "  manifest"]
    shown_above = {"sources", "levels", "shards", "totals", "rejects"}
    for field in dataclasses.fields(manifest):
        if field.name not in shown_above:
            lines.append(f"  {field.name:<24}{getattr(manifest, field.name)!r}")
    return lines


def _spread(values: np.ndarray) -> Spread:
    """Compute the spread of one column; integers get bars of integer width."""
    low = float(values.min())
    high = float(values.max())
    width = max(1.0, np.ceil((high - low + 1) / HISTOGRAM_ROWS))
    edges = low + width * np.arange(max(1, int(np.ceil((high - low + 1) / width))) + 1)
    bars, _ = np.histogram(values, edges)
    levels = np.percentile(values, PERCENTILES)
    return Spread(
        mean=float(values.mean(dtype=np.float64)),
        min=low,
        max=high,
        percentiles={
            percent: float(level) for percent, level in zip(PERCENTILES, levels, strict=True)
        },
        bar_edges=tuple(float(edge) for edge in edges),
        bars=tuple(int(count) for count in bars),
    )


def _histogram(spread: Spread) -> list[str]:
    """Return a text histogram, one line for each bar."""
    lines = []
    for low, high, count in zip(spread.bar_edges, spread.bar_edges[1:], spread.bars, strict=False):
        label = f"{low:,.0f}" if high - low == 1 else f"{low:,.0f}-{high - 1:,.0f}"
        lines.append(
            f"  {label:>15} {count:>12,} {'#' * round(HISTOGRAM_WIDTH * count / max(spread.bars))}"
        )
    return lines
