"""One page of HTML about runs; it needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from megavlm.config.cli import from_yaml
from megavlm.config.schema import Config
from megavlm.evaluate.page import STYLE, Answered, read_rows, task_lines
from megavlm.io import atomic
from megavlm.report.chart import chart, colour_of
from megavlm.report.plan import Share, chunk_shares, source_shares
from megavlm.report.run_log import Event, Run, Start, newest_settings

# Figures that people look at first, in this order; the others follow as they come.
_FIRST = ("loss", "valid_loss", "lr", "grad_norm", "tokens_per_s", "seconds_per_step")
_CHARTS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(22em, 1fr)); gap: 1em }
figure { margin: 0 } figcaption { font-weight: 600 }
svg polyline { fill: none; stroke-width: 1.6 } svg line { stroke: #e4e4e4 }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
.run::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: var(--colour) }
"""


def write_report(path: Path, runs: Sequence[Run], answers: int) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        runs: side by side.
        answers: most answers that are shown of a task.
    """
    atomic.write_text(path, "\n".join(_lines(runs, answers)) + "\n")


def figure_names(runs: Sequence[Run]) -> list[str]:
    """Return the figures of all runs that have a curve, in the order of the page."""
    found = dict.fromkeys(name for run in runs for name in run.figures)
    drawn = [name for name in found if any(len(run.figures.get(name, ())) > 1 for run in runs)]
    return sorted(drawn, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _lines(runs: Sequence[Run], answers: int) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Runs</title>'
    yield f"<style>{STYLE}{_CHARTS}</style>\n<h1>Runs</h1>"
    yield from _summary(runs)
    yield '<div class="charts">'
    for name in figure_names(runs):
        curves = [run.figures.get(name, []) for run in runs]
        yield f"<figure><figcaption>{escape(name)}</figcaption>{chart(name, curves)}</figure>"
    yield "</div>"
    yield from _differences(runs)
    yield from _shares(runs)
    yield from _events(runs)
    yield from _answers(runs, answers)
    figures = {run.name: run.figures for run in runs}
    content = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="figures">{content}</script>'


def _row(cells: Sequence[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in cells) + "</tr>"


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names with their colours."""
    return [
        f'<span class="run" style="--colour: {colour_of(number)}">{escape(run.name)}</span>'
        for number, run in enumerate(runs)
    ]


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    """Show the last value of each figure."""
    yield "<table>" + _row(["", *_names(runs)], "th")
    yield _row(["folder", *(escape(str(run.folder)) for run in runs)])
    yield _row(["step", *(f"{_last_step(run):,}" for run in runs)])
    for name in figure_names(runs):
        last = [run.figures.get(name) for run in runs]
        yield _row([escape(name), *(f"{points[-1][1]:.6g}" if points else "–" for points in last)])
    yield "</table>"


def _last_step(run: Run) -> int:
    return max((points[-1][0] for points in run.figures.values() if points), default=0)


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Show the options whose values differ between the runs."""
    known = [run for run in runs if run.settings]
    if len(known) < 2:
        return
    names = dict.fromkeys(name for run in known for name in run.settings)
    rows = {
        name: [json.dumps(run.settings.get(name), ensure_ascii=False) for run in runs]
        for name in names
        if len({json.dumps(run.settings.get(name)) for run in known}) > 1
    }
    yield "<h2>Different settings</h2>\n<table>" + _row(["", *_names(runs)], "th")
    for name, values in rows.items():
        yield _row([f"<code>--{escape(name)}</code>", *map(escape, values)])
    yield "</table>"


def _events(runs: Sequence[Run]) -> Iterator[str]:
    """Show when the runs were started, resumed and saved, what was done again for it, and which
    steps had no update.
    """
    yield "<h2>Events</h2>\n<table>" + _row(["run", "time (UTC)", "event"], "th")
    for name, run in zip(_names(runs), runs, strict=True):
        events = [*map(_started, run.starts), *run.skips, *run.saves]
        for event in sorted(events, key=lambda event: event.time):
            time = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
            yield _row([name, time, event.text])
    yield "</table>"


def _started(start: Start) -> Event:
    again = start.reached - start.step
    text = f"resumed after step {start.step:,}" if start.reached else "started"
    if again > 0:
        text += f"; {again:,} steps that had been done were done again"
    return Event(time=start.time, text=text)


def _shares(runs: Sequence[Run]) -> Iterator[str]:
    """Show model chunks and data of the runs that have a checkpoint, or why they are not known."""
    for title, columns, shares_of in (
        ("Layout", ("pipeline stage", "layers", "share of FLOPs"), chunk_shares),
        ("Data", ("source", "samples", "share of samples"), source_shares),
    ):
        rows = [
            _row([name, *cells])
            for name, run in zip(_names(runs), runs, strict=True)
            for cells in _known(run, shares_of)
        ]
        if rows:
            yield f"<h2>{title}</h2>\n<table>" + _row(["run", *columns], "th")
            yield from rows
            yield "</table>"


def _known(run: Run, shares_of: Callable[[Config], list[Share]]) -> list[list[str]]:
    """Return the cells of the shares of a run; of one whose packs are gone, what is missing."""
    path = newest_settings(run.folder)
    if path is None:
        return []
    try:
        found = shares_of(from_yaml(path))
    except (OSError, ValueError) as error:
        return [["", escape(f"not known: {error}"), ""]]
    return [[escape(part.name), escape(part.content), f"{part.share:.1%}"] for part in found]


def _answers(runs: Sequence[Run], most: int) -> Iterator[str]:
    """Show the newest answers of the runs that have some."""
    answered = [_answered(run) for run in runs if run.answers is not None]
    for task in dict.fromkeys(task for run in answered for task in run.rows):
        yield from task_lines(task, [run for run in answered if task in run.rows], most)


def _answered(run: Run) -> Answered:
    return Answered(
        model=run.name,
        figures={},
        rows={path.stem: read_rows(path) for path in sorted(run.answers.glob("*.jsonl"))},
    )
