"""One page of HTML about how models answered tasks: figures, then pictures, questions, answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megavlm.data.images.thumbnail import thumbnail
from megavlm.io import atomic

_SIDE = 256
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left; vertical-align: top }
td.figure { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 12em; max-height: 12em; margin-right: .3em }
.right { background: #e3f4e3 } .part { background: #fdf6d8 } .wrong { background: #fbe3e3 }
"""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model made of the tasks.

    Args:
        model: its name.
        figures: by name, ``TASK/FIGURE``; none: not finite.
        rows: of each task, what the answers' file holds of each question.
    """

    model: str
    figures: Mapping[str, float | None]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of answers."""
    # Not splitlines, which also cuts at characters that texts may hold.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def table_lines(models: Sequence[Answered]) -> list[str]:
    """Return the figures as a table of text, a line for each figure."""
    rows = list(_figures(models))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _figure(model: Answered, name: str) -> str:
    value = model.figures.get(name)  # none of what is not finite, such as a similarity
    return "-" if value is None else f"{value:.4f}"


def write_page(path: Path, models: Sequence[Answered], questions: int) -> None:
    """Write the page; it needs no other file.

    Args:
        path: of the HTML file.
        models: in the order of their columns.
        questions: most that are shown of a task.
    """
    atomic.write_text(path, "\n".join(_lines(models, questions)) + "\n")


def _lines(models: Sequence[Answered], questions: int) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Answers</title>'
    yield f"<style>{STYLE}</style>\n<h1>Answers</h1>\n<table>"
    header, *rows = _figures(models)
    yield "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"
    for name, *figures in rows:
        cells = "".join(f'<td class="figure">{figure}</td>' for figure in figures)
        yield f"<tr><td>{escape(name)}</td>{cells}</tr>"
    yield "</table>"
    for task in dict.fromkeys(task for model in models for task in model.rows):
        yield from task_lines(task, [model for model in models if task in model.rows], questions)


def _figures(models: Sequence[Answered]) -> Iterator[list[str]]:
    """Yield the rows of the table of figures, of which the first has the names of the models."""
    yield ["", *(model.model for model in models)]
    for name in dict.fromkeys(name for model in models for name in model.figures):
        yield [name, *(_figure(model, name) for model in models)]


def task_lines(task: str, models: Sequence[Answered], questions: int) -> Iterator[str]:
    """Yield the lines of HTML that show a task's questions and the models' answers.

    Args:
        task: its name.
        models: that have answered it.
        questions: most that are shown.
    """
    rows = models[0].rows[task]
    shown = f": the first {questions} of {len(rows)}" if len(rows) > questions else ""
    yield f"<h2>{escape(task)}{shown}</h2>\n<table>"
    names = "".join(f"<th>{escape(model.model)}</th>" for model in models)
    yield f"<tr><th>id</th><th>images, videos</th><th>question</th><th>right</th>{names}</tr>"
    # Runs may have been asked different questions under one name.
    given = {model.model: {row["id"]: row for row in model.rows[task]} for model in models}
    for row in rows[:questions]:
        pictures = "".join(_picture(Path(path)) for path in row["image"])
        pictures += "<br>".join(escape(Path(path).name) for path in row.get("video", ()))
        text = escape(str(row["question"])).replace("\n", "<br>")
        truth = "<br>".join(escape(answer) for answer in dict.fromkeys(row["answers"]))
        answers = "".join(_answer(given[model.model].get(row["id"])) for model in models)
        cells = (escape(row["id"]), pictures, text, truth)
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"{answers}</tr>"
    yield "</table>"


def _answer(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    score = row["score"]
    kind = "right" if score >= 1 else "part" if score > 0 else "wrong"
    return f'<td class="{kind}" title="{score:.3g}">{escape(row["prediction"])}</td>'


def _picture(path: Path) -> str:
    """Return a small copy of an image, inside the page."""
    try:
        content = base64.b64encode(thumbnail(path, _SIDE)).decode()
    except OSError as error:
        return escape(f"{path}: {error}")
    return f'<img src="data:image/jpeg;base64,{content}" alt="{escape(path.name)}">'
