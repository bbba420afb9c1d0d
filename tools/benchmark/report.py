"""The results for people: a line as each case ends, then one table, in Markdown."""

from __future__ import annotations

from tools.benchmark.cases import Case, predicted_gib, predicted_tflop, shortage

COLUMNS = (
    ("case", 54),
    ("tokens/s", 10),
    ("tiles/s", 9),
    ("step ms", 9),
    ("least - most", 17),
    ("TFLOP/s", 8),
    ("MFU", 6),
    ("GiB", 6),
    ("wait ms", 8),
)


def header() -> str:
    """Names of the columns, as the first two lines of a Markdown table."""
    return (
        _line([name for name, _ in COLUMNS]) + "\n" + _line(["-" * width for _, width in COLUMNS])
    )


def line(row: dict) -> str:
    """Write a row of the results."""
    if row["error"]:
        return _line([row["name"]]) + f" {row['error']}"
    return _line(
        [
            row["name"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tiles_per_s']:.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['step_ms_least']:.1f} - {row['step_ms_most']:.1f}",
            f"{row['tflops']:.1f}",
            f"{row['mfu']:.1%}",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['data_wait_ms']:.1f}",
        ]
    )


def kernels(row: dict) -> str:
    """Where the profiled step of a case went; empty where none was profiled."""
    found = row.get("kernels")
    if not found or not found["span_ms"]:
        return ""
    shares = ", ".join(
        f"{name} {ms:.1f} ms ({ms / found['span_ms']:.0%})"
        for name, ms in found["groups_ms"].items()
    )
    longest = "".join(
        f"\n    {each['ms']:9.2f} ms  {each['calls']:5} x  {each['name'][:90]}"
        for each in found["longest"][:6]
    )
    return f"  one step of {found['span_ms']:.1f} ms: {shares}{longest}"


def comparisons(rows: list[dict]) -> str:
    """Each case against this project's in bfloat16 without recomputation, of the same model and
    stage.
    """
    done = [row for row in rows if not row["error"]]
    base = {
        (row["model"], row["stage"]): row
        for row in reversed(done)
        if (row["implementation"], row["precision"]) == ("megavlm", "bf16")
        and row["recompute"] != "full"
    }
    told = []
    for row in done:
        ours = base.get((row["model"], row["stage"]))
        if ours is not None and ours is not row:
            told.append(
                f"  {row['name']}: {row['tokens_per_s'] / ours['tokens_per_s']:.2f} x the tokens/s"
                f" of {ours['name']}"
            )
    return "\n".join(told)


def plan(cases: list[Case], memory_gib: float | None = None) -> str:
    """List the cases with what is expected of them before anything runs.

    Args:
        cases: what was chosen.
        memory_gib: of the device; cases that need more stand at the end, with the reason. None: all
            are listed alike.
    """
    skipped = [(case.name, why) for case in cases if (why := shortage(case, memory_gib))]
    cases = [case for case in cases if not shortage(case, memory_gib)]
    lines = [
        f"{'case':62} {'TFLOP a step':>13} {'ms at 100% MFU':>15} {'GiB (megavlm)':>14}"
        f" {'limit s':>8}"
    ]
    for case in cases:
        work = predicted_tflop(case)
        lines.append(
            f"{case.name:62} {work:13.2f} {work / 989 * 1e3:15.2f} {predicted_gib(case):14.1f}"
            f" {case.limit_s:8}"
        )
    lines += [f"{name:62} {why}" for name, why in skipped]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    first, *others = (
        f"{cell:{'>' if at else '<'}{width}}"
        for at, (cell, (_, width)) in enumerate(zip(cells, COLUMNS))
    )
    return f"| {' | '.join([first, *others])} |"
