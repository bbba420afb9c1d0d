"""Estimates of layouts as a table, and as a picture of their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megavlm.parallel.estimate import Estimate

_COLUMNS = ("TP", "PP", "DP", "recompute", "GiB", "bubble", "TP GB", "DP GB", "step s", "tokens/s/GPU", "layout")
_WIDTHS = (3, 3, 5, 10, 6, 7, 7, 7, 8, 13)


def to_text(estimates: Sequence[Estimate]) -> str:
    """A line for each layout."""
    rows = [_COLUMNS] + [_row(one) for one in estimates]
    return "\n".join("  ".join([*(cell.rjust(width) for cell, width in zip(row, _WIDTHS, strict=False)), row[-1]]) for row in rows)


def _row(one: Estimate) -> tuple[str, ...]:
    parallel = one.parallel
    return (
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(one.data_ranks),
        parallel.recompute,
        f"{one.memory_gib:.1f}",
        f"{one.bubble:.1%}",
        f"{one.tensor_gb:.1f}",
        f"{one.data_gb:.1f}",
        f"{one.step_ms / 1e3:.2f}",
        f"{one.tokens_per_s:,.0f}",
        parallel.layout if parallel.pipeline_model_parallel_size > 1 else "",
    )


def draw(estimates: Sequence[Estimate], path: Path) -> None:
    """Draw a bar for each layout: its chunks, as long as they take for one pack.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 0.6 + 0.5 * len(estimates)), layout="constrained")
    for row, one in enumerate(estimates):
        start = 0.0
        for number, time in enumerate(one.chunk_ms):
            axes.barh(row, time, left=start, color=f"C{number % 10}", edgecolor="white")
            axes.text(start + time / 2, row, f"{time:.0f}", ha="center", va="center", color="white", fontsize=8)
            start += time
    axes.set_yticks(range(len(estimates)), [_label(one) for one in estimates])
    axes.invert_yaxis()
    axes.set_xlabel("chunks of the pipeline, milliseconds for one pack")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _label(one: Estimate) -> str:
    parallel = one.parallel
    sizes = f"TP {parallel.tensor_model_parallel_size} PP {parallel.pipeline_model_parallel_size} DP {one.data_ranks}"
    return f"{sizes}, {parallel.recompute}: {one.step_ms / 1e3:.2f} s"
