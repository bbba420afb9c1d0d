"""Boards of handwritten digits: pictures of one to six cells with scans from scikit-learn's digits,
and questions about them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

# pixels; a board's cells become tiles of 16 x 16, one each, since tiling takes the grid of the
# board's own shape
CELL = 20
FRAME = 2  # pixels; around the board, so that a cell shows at which of its edges it stands
SHAPES = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2))  # rows, columns
EMPTY_SHARE = 0.25
MARK = np.array([250.0, 215.0, 90.0])  # paper of the marked cell


@dataclass(frozen=True, kw_only=True)
class Scans:
    """Real handwritten digits.

    Args:
        images: [N, 8, 8], 0 (paper) to 16 (ink).
        labels: [N], the digit of each.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board and what it shows.

    Args:
        rows, columns: its shape.
        digits: the digit of each cell, row by row; none where the cell is empty.
        marked: the marked cell, which is not empty; none on a board of one cell.
        picture: the image.
    """

    rows: int
    columns: int
    digits: tuple[int | None, ...]
    marked: int | None
    picture: Image.Image


def split_scans(held_out: int, seed: int) -> tuple[Scans, Scans]:
    """Split the 1,797 scans into those for training and ``held_out`` others."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    parts = order[held_out:], order[:held_out]
    train, valid = (Scans(images=data.images[part], labels=data.target[part]) for part in parts)
    return train, valid


def draw_scan(rng: np.random.Generator, scan: np.ndarray, size: int) -> np.ndarray:
    """Rotate a scan slightly and enlarge it to ``size`` pixels: share of ink, [size, size]."""
    picture = Image.fromarray(np.uint8(np.clip(scan * 255 / 16, 0, 255))).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return (
        np.asarray(picture.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC), np.float32) / 255
    )


def make_board(
    rng: np.random.Generator, scans: Scans, shape: tuple[int, int] | None = None
) -> Board:
    """Make a framed board of random shape, contents and colours; the marked cell has another colour
    of paper.
    """
    rows, columns = shape or SHAPES[rng.integers(len(SHAPES))]
    count = rows * columns
    filled = rng.random(count) >= EMPTY_SHARE
    marked = int(rng.integers(count))
    filled[marked] = True
    chosen = rng.integers(len(scans), size=count)
    paper = rng.uniform(215, 255, 3)
    ink = rng.uniform(0, 90, 3)
    pixels = np.broadcast_to(paper, (rows * CELL, columns * CELL, 3)).copy()
    for place in range(count):
        top, left = (CELL * n for n in divmod(place, columns))
        if place == marked and count > 1:
            pixels[top : top + CELL, left : left + CELL] = MARK + rng.uniform(-15, 15, 3)
        if filled[place]:
            size = int(rng.integers(CELL - 2 * FRAME - 2, CELL - 2 * FRAME + 1))
            top, left = (
                start + FRAME + int(rng.integers(CELL - 2 * FRAME - size + 1))
                for start in (top, left)
            )
            share = draw_scan(rng, scans.images[chosen[place]], size)[..., None]
            region = pixels[top : top + size, left : left + size]
            region[:] = region * (1 - share) + ink * share
    for edge in (pixels[:FRAME], pixels[-FRAME:], pixels[:, :FRAME], pixels[:, -FRAME:]):
        edge[:] = ink
    digits = tuple(
        int(scans.labels[scan]) if there else None
        for scan, there in zip(chosen, filled, strict=True)
    )
    picture = Image.fromarray(np.uint8(pixels.clip(0, 255)))
    return Board(
        rows=rows,
        columns=columns,
        digits=digits,
        marked=marked if count > 1 else None,
        picture=picture,
    )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a board, or about several, and its answer.

    Args:
        kind: what is asked for: digit, marked, row, column, count or image.
        text: the question.
        answer: the answer.
    """

    kind: str
    text: str
    answer: str


def shape_of(board: Board) -> str:
    """Say the board's shape."""
    return f"{board.rows} x {board.columns} board."


def questions(board: Board) -> list[Question]:
    """Every question that can be asked about one board."""
    if board.marked is None:
        return [Question(kind="digit", text="Which digit is this?", answer=str(board.digits[0]))]
    row, column = divmod(board.marked, board.columns)
    there = sum(digit is not None for digit in board.digits)
    return [
        Question(
            kind="marked", text="Which digit is marked?", answer=str(board.digits[board.marked])
        ),
        Question(kind="row", text="In which row is the mark?", answer=str(row + 1)),
        Question(kind="column", text="In which column is the mark?", answer=str(column + 1)),
        Question(kind="count", text="How many digits are there?", answer=str(there)),
    ]
