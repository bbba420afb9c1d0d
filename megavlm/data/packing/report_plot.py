"""The report of a packing as a plot."""

from __future__ import annotations

from pathlib import Path

from megavlm.data.packing.report import Histogram, Report

COLOUR = "#4878a8"
OTHER_COLOUR = "#c0c8d0"
TAKEN_COLOUR = "#b03060"
SHOWN_SOURCES = 16


def draw_report(report: Report, path: Path) -> None:
    """Draw the figures into an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    figure.suptitle(
        f"{report.out}: {report.records:,} records, {report.packs:,} packs of {report.capacity:,}"
        f" tokens, {report.fill:.3%} filled, {report.rejected:,} rejected"
    )
    axes = figure.subplots(2, 3)
    unit = "sample" if report.pairs is None else "pair"
    _draw_histogram(axes[0, 0], report.lengths, "tokens", unit)
    _draw_histogram(axes[0, 1], report.tile_counts, "tiles", unit)
    _draw_caps(axes[0, 2], report)
    sources = report.sources[:SHOWN_SOURCES]
    names = [source.name for source in sources]
    _draw_bars(axes[1, 0], names, [100 * source.share for source in sources], "% of all tokens")
    _draw_bars(axes[1, 1], names, [source.samples for source in sources], "samples")
    _draw_rejects(axes[1, 2], report)
    figure.savefig(path, dpi=100)


def _draw_histogram(axes, histogram: Histogram, name: str, unit: str) -> None:
    """Draw a histogram of the samples or pairs; the counts differ by powers of ten."""
    axes.bar(
        histogram.edges[:-1],
        histogram.counts,
        width=histogram.edges[1] - histogram.edges[0],
        align="edge",
        color=COLOUR,
    )
    axes.set(xlabel=f"{name} of a {unit}", ylabel=f"{unit}s", yscale="log")


def _draw_caps(axes, report: Report) -> None:
    """Draw the fill with other tile caps."""
    axes.plot(
        [trial.tile_cap for trial in report.caps],
        [100 * trial.fill for trial in report.caps],
        marker="o",
        color=COLOUR,
    )
    axes.axvline(report.tile_cap, color=TAKEN_COLOUR, label=f"taken: {report.tile_cap}")
    axes.axvline(
        report.tiles_per_pack_mean,
        color=OTHER_COLOUR,
        label=f"mean of a pack: {report.tiles_per_pack_mean:.1f}",
    )
    axes.set(xlabel="tile cap", ylabel="fill, % of the best possible")
    axes.legend()


def _draw_bars(axes, names: list[str], values: list[float], label: str) -> None:
    """Draw a bar for each source."""
    bars = axes.barh(names, values, color=COLOUR)
    axes.bar_label(bars, fmt="{:,.6g}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(label)


def _draw_rejects(axes, report: Report) -> None:
    """Draw the records that were left out, by reason."""
    if not report.rejects:
        axes.axis("off")
        axes.text(0.5, 0.5, "no record was rejected", ha="center", va="center")
        return
    bars = axes.barh(list(report.rejects), list(report.rejects.values()), color=OTHER_COLOUR)
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("rejected records")
