"""Make preferences about the quickstart's boards of digits: a question, its right answer as the
chosen one and a wrong one as the rejected one, as the lines of InternVL's MMPR have them.

python examples/preference/make_pairs.py OUT
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from boards import Board, Question, questions, shape_of, split_scans
from make_data import HELD_OUT_SCANS, Maker, write_lines
from try_out import parse_parts


def wrong_answer(rng: np.random.Generator, board: Board, question: Question) -> str:
    """Return another answer that the question could have on a board of this shape."""
    cells = board.rows * board.columns
    possible = {
        "digit": range(10),
        "marked": range(10),
        "row": range(1, board.rows + 1),
        "column": range(1, board.columns + 1),
        "count": range(1, cells + 1),
    }[question.kind]
    others = [str(answer) for answer in possible if str(answer) != question.answer]
    # A board of one row has its mark in row 1, whatever a model says.
    return others[rng.integers(len(others))] if others else str(cells)


def preferences(maker: Maker, count: int) -> Iterator[dict[str, Any]]:
    """Yield records of one question about a board, and two answers to it."""
    for _ in range(count):
        board, image = maker.board()
        [question, *_] = maker.shuffled(questions(board))
        yield {
            "image": image,
            "question": f"<image>\n{shape_of(board)} {question.text}",
            "chosen": question.answer,
            "rejected": wrong_answer(maker.rng, board, question),
        }


def main() -> None:
    """Run the command line: OUT is a folder that the quickstart's make_data.py has made."""
    options = parse_parts(__doc__, train=6000, valid=400, seed=0)
    train, held_out = split_scans(HELD_OUT_SCANS, options.seed)
    for number, (name, scans) in enumerate((("train", train), ("valid", held_out)), start=11):
        maker = Maker(scans, options.seed + number, options.out / "images", f"pair_{name}")
        records = list(preferences(maker, vars(options)[name]))
        write_lines(options.out / f"pairs_{name}.jsonl", records)


if __name__ == "__main__":
    main()
