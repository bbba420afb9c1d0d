"""Estimates of layouts as tables, and as a picture of their chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megavlm.planner.estimate import Estimate, Hardware
from megavlm.planner.search import describe

_OPTIONS = ("option", "GiB", "activations GiB", "step s", "fits")


class _Column(NamedTuple):
    """A column of the table of layouts.

    Args:
        name: its head.
        cell: makes a layout's cell.
        of_experts: whether it says something of models with experts alone.
    """

    name: str
    cell: Callable[[Estimate], str]
    of_experts: bool = False


def _gigabytes(sent: float) -> str:
    return f"{sent / 1e9:.1f}"


def _vision(one: Estimate) -> str:
    return one.parallel.vision if one.parallel.tensor_model_parallel_size > 1 else ""


_COLUMNS = (
    _Column("TP", lambda one: str(one.parallel.tensor_model_parallel_size)),
    _Column("PP", lambda one: str(one.parallel.pipeline_model_parallel_size)),
    _Column("V", lambda one: str(one.parallel.virtual_pipeline_model_parallel_size)),
    _Column("CP", lambda one: str(one.parallel.context_parallel_size)),
    _Column("EP", lambda one: str(one.parallel.expert_model_parallel_size), of_experts=True),
    _Column("ETP", lambda one: str(one.parallel.expert_tensor_parallel_size), of_experts=True),
    _Column("DP", lambda one: str(one.data_ranks)),
    _Column("vision", _vision),
    _Column("recompute", lambda one: one.parallel.recompute),
    _Column("GiB", lambda one: f"{one.memory_gib:.1f}"),
    _Column("bubble", lambda one: f"{one.bubble:.1%}"),
    _Column("TP GB", lambda one: _gigabytes(one.communication.tensor)),
    _Column("CP GB", lambda one: _gigabytes(one.communication.context)),
    _Column("EP GB", lambda one: _gigabytes(one.communication.expert), of_experts=True),
    _Column("PP GB", lambda one: _gigabytes(one.communication.pipeline)),
    _Column("DP GB", lambda one: _gigabytes(one.communication.data)),
    _Column("step s", lambda one: f"{one.step_ms / 1e3:.2f}"),
    _Column("tokens/s/GPU", lambda one: f"{one.tokens_per_s:,.0f}"),
)


def to_text(estimates: Sequence[Estimate], has_experts: bool = False) -> str:
    """Write a line for each layout. V: model chunks per pipeline rank; GB: what a GPU sends in a
    step, by kind of parallelism; EP: expert-parallel ranks, of a model with experts.
    """
    columns = [column for column in _COLUMNS if has_experts or not column.of_experts]
    rows = [tuple(column.cell(one) for column in columns) for one in estimates]
    return _table([tuple(column.name for column in columns), *rows])


def options_to_text(changed: Mapping[str, Estimate], hardware: Hardware) -> str:
    """Write a line for each option."""
    rows = [
        (
            name,
            f"{one.memory_gib:.1f}",
            f"{one.memory.activations / 2**30:.1f}",
            f"{one.step_ms / 1e3:.2f}",
            "yes" if one.fits(hardware) else "no",
        )
        for name, one in changed.items()
    ]
    return _table([_OPTIONS, *rows], left=1)


def _table(rows: Iterable[tuple[str, ...]], left: int = 0) -> str:
    """Columns as wide as they need to be; the first ``left`` stand to the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            f"{cell:{'<' if at < left else '>'}{width}}"
            for at, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def draw(estimates: Sequence[Estimate], path: Path) -> None:
    """Draw a bar for each layout: its chunks, as long as their share of a pack's time, in the
    colour of the pipeline rank that holds them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.6 * len(estimates)), layout="constrained")
    for row, one in enumerate(estimates):
        start = 0.0
        whole = sum(one.chunk_ms)
        for number, time in enumerate(one.chunk_ms):
            rank = number % one.parallel.pipeline_model_parallel_size
            # As shares: packs take a pipeline with many ranks for each copy of the model less time,
            # and its chunks would not be seen.
            axes.barh(
                row,
                time / whole,
                left=start,
                color=f"C{rank % 10}",
                edgecolor="white",
                linewidth=0.7,
            )
            label = (
                f"rank {rank}\n{time:.0f}"
                if time / whole > 0.055
                else f"{rank}\n{time:.0f}"
                if time / whole > 0.018
                else f"{rank}"
            )
            axes.text(
                start + time / whole / 2,
                row,
                label,
                ha="center",
                va="center",
                color="white",
                fontsize=6,
            )
            start += time / whole
    axes.set_yticks(
        range(len(estimates)),
        [f"{describe(one)}: {one.step_ms / 1e3:.2f} s" for one in estimates],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel(
        "chunks in the order of the pipeline, with the pipeline rank that holds each, and"
        " milliseconds for one pack"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
