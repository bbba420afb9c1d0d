"""Estimates of layouts as tables, and as a picture of their chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megavlm.planner.estimate import Estimate, Hardware
from megavlm.planner.search import describe

_COLUMNS = (
    "TP",
    "PP",
    "V",
    "CP",
    "DP",
    "vision",
    "recompute",
    "GiB",
    "bubble",
    "TP GB",
    "CP GB",
    "PP GB",
    "DP GB",
    "step s",
    "tokens/s/GPU",
)
_EXPERT_COLUMNS = {"EP": "CP", "EP GB": "CP GB"}
"""Columns of models with experts, by the column that each stands behind."""
_OPTIONS = ("option", "GiB", "activations GiB", "step s", "fits")


def to_text(estimates: Sequence[Estimate], has_experts: bool = False) -> str:
    """Write a line for each layout. V: model chunks per pipeline rank; GB: what a GPU sends in a
    step, by kind of parallelism; EP: expert-parallel ranks, of a model with experts.
    """
    rows = [_COLUMNS, *map(_row, estimates)]
    if not has_experts:
        return _table(rows)
    columns = [_expert_columns(one) for one in estimates]
    extra = [tuple(_EXPERT_COLUMNS), *columns]
    return _table(map(_with_columns, rows, extra))


def _expert_columns(one: Estimate) -> tuple[str, ...]:
    return str(one.parallel.expert_model_parallel_size), f"{one.communication.expert / 1e9:.1f}"


def _with_columns(row: tuple[str, ...], extra: tuple[str, ...]) -> tuple[str, ...]:
    """Put the columns of experts into a row."""
    found = list(row)
    places = [_COLUMNS.index(before) for before in _EXPERT_COLUMNS.values()]
    for cell, place in sorted(zip(extra, places, strict=True), key=lambda one: -one[1]):
        found.insert(place + 1, cell)
    return tuple(found)


def _row(one: Estimate) -> tuple[str, ...]:
    parallel = one.parallel
    communication = one.communication
    return (
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size),
        str(parallel.context_parallel_size),
        str(one.data_ranks),
        parallel.vision if parallel.tensor_model_parallel_size > 1 else "",
        parallel.recompute,
        f"{one.memory_gib:.1f}",
        f"{one.bubble:.1%}",
        *(
            f"{sent / 1e9:.1f}"
            for sent in (
                communication.tensor,
                communication.context,
                communication.pipeline,
                communication.data,
            )
        ),
        f"{one.step_ms / 1e3:.2f}",
        f"{one.tokens_per_s:,.0f}",
    )


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

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
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
