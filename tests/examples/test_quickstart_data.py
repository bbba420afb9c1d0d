"""The quickstart's data: what is asked is what is shown, and nothing held out is seen in
training.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megavlm.evaluate.task import read_task

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def boards():
    pytest.importorskip(
        "sklearn", reason="the quickstart extra is not installed: pip install megavlm[quickstart]"
    )
    sys.path.insert(0, str(FOLDER))
    try:
        import boards as module
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_no_scan_is_in_both_parts(boards) -> None:
    train, held_out = boards.split_scans(360, seed=0)
    assert (len(train), len(held_out)) == (1437, 360)
    learnt = {scan.tobytes() for scan in train.images}
    assert not any(scan.tobytes() in learnt for scan in held_out.images)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 2)])
def test_answers_are_what_the_board_shows(boards, shape: tuple[int, int]) -> None:
    train, _ = boards.split_scans(360, seed=0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        board = boards.make_board(rng, train, shape)
        assert board.picture.size == (shape[1] * boards.CELL, shape[0] * boards.CELL)
        answers = {question.kind: question.answer for question in boards.questions(board)}
        if shape == (1, 1):
            assert answers == {"digit": str(board.digits[0])}
            continue
        assert answers["count"] == str(sum(digit is not None for digit in board.digits))
        place = (int(answers["row"]) - 1) * shape[1] + int(answers["column"]) - 1
        assert place == board.marked and answers["marked"] == str(board.digits[place])


def test_each_cell_becomes_a_tile(boards) -> None:
    from megavlm.data.images.tiling import choose_grid

    for rows, columns in boards.SHAPES:
        assert choose_grid(columns * boards.CELL, rows * boards.CELL, 1, 6, 16) == (columns, rows)


@pytest.mark.slow
def test_the_same_seed_makes_the_same_data(boards, tmp_path: Path) -> None:
    sizes = ["--records", "20", "--texts", "20", "--lone", "5", "--exam", "16"]
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, str(FOLDER / "make_data.py"), str(tmp_path / name), *sizes],
            check=True,
            capture_output=True,
        )
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        ), path
    exam = read_task(tmp_path / "one" / "exam.jsonl")
    assert len(exam.questions) == 16 and exam.metric == "exact_match"
    assert {question.category for question in exam.questions} >= {"image", "count"}
