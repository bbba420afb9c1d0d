"""The page that compares models."""

from __future__ import annotations

from pathlib import Path

from megavlm.evaluate.page import Answered, table_lines, write_page


def test_a_figure_that_is_no_number_has_a_cell() -> None:
    lost = Answered(model="lost", figures={"alike/similarity": None}, rows={})
    good = Answered(model="good", figures={"alike/similarity": 0.5}, rows={})
    assert [line.split()[1:] for line in table_lines([lost, good])][1] == ["-", "0.5000"]


def test_the_first_questions_are_shown_with_the_answers_of_each_model(tmp_path: Path) -> None:
    rows = [
        dict(id=f"q{number}", question="Who?", image=[], answers=["he", "he", "she"], score=score)
        | dict(prediction=f"answer {number}")
        for number, score in enumerate((1.0, 0.5, 0.0, 1.0))
    ]
    both = Answered(model="both", figures={}, rows={"task": rows})
    # Asked fewer questions, in another order.
    fewer = Answered(model="fewer", figures={}, rows={"task": [rows[2], rows[0]]})
    write_page(tmp_path / "index.html", [both, fewer], 3)
    page = (tmp_path / "index.html").read_text()
    assert "task: the first 3 of 4" in page and "answer 3" not in page
    assert page.count("<td>he<br>she</td>") == 3
    found = [line for line in page.split("\n") if line.startswith("<tr><td>q")]
    assert [line.count(f">answer {number}</td>") for number, line in enumerate(found)] == [2, 1, 2]
    for line, kind in zip(found, ("right", "part", "wrong"), strict=True):
        assert f'class="{kind}"' in line
    assert "<td>–</td>" in found[1]
