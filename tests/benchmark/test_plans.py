"""The table of layouts in the documentation is what the planner proposes."""

from __future__ import annotations

import json
from pathlib import Path

from tools.benchmark.plans import ASKED, plan, to_markdown

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_table_is_that_of_the_committed_figures():
    rows = json.loads((DOCS / "benchmarks/plans.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["gpus"]) for row in rows] == [
        (model, gpus) for model, sizes in ASKED.items() for gpus in sizes
    ]
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- table of tools/benchmark/plans.py: from here -->\n")
    assert rest.partition("<!-- to here -->")[0].splitlines() == list(to_markdown(rows))
    assert rows[0] == plan("internvl2_5-1b", 8)
