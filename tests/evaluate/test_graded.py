"""Answers beside the truth."""

from __future__ import annotations

import json
from pathlib import Path

from megavlm.evaluate.graded import Prediction, grade
from megavlm.evaluate.task import read_task


def test_categories_have_figures_of_their_own_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    rows = [dict(question="Who?", answer="he", category=name) for name in ("b", "a", "", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [Prediction(text=text) for text in ("he", "she", "he", "she")]
    graded = grade(read_task(path), given)
    assert graded.figures == {"exam/accuracy": 0.5}
    assert all("tokens" not in row and "video" not in row for row in graded.rows)
    ((figure, categories),) = graded.by_category.items()
    assert (figure, list(categories.items())) == ("exam/accuracy", [("a", 0.0), ("b", 0.5)])
