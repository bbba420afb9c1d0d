"""Make the quickstart's data: boards and conversations about them, text for the language part,
held-out questions, and a tokenizer.

python examples/quickstart/make_data.py OUT
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from boards import Board, Question, Scans, make_board, questions, shape_of, split_scans
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYSTEM = "You read boards of digits."
HELD_OUT_SCANS = 360
SEVERAL_SHARE = 0.12
TEXT_SHARE = 0.06
VOCABULARY = 500
BLANK = "_"  # an empty cell, in words
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def conversation(asked: list[Question], start: str, images: list[str]) -> dict[str, Any]:
    """Make a record in InternVL's format: each question is a turn, the first after ``start``."""
    turns = [{"from": "system", "value": SYSTEM}]
    for number, question in enumerate(asked):
        turns.append({"from": "human", "value": (start if number == 0 else "") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    record: dict[str, Any] = {"conversations": turns}
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    return record


def about_board(board: Board, asked: list[Question], image: str) -> dict[str, Any]:
    """Make a record of questions about one image."""
    return conversation(asked, f"<image>\n{shape_of(board)} ", [image])


def about_text(board: Board, asked: list[Question]) -> dict[str, Any]:
    """Make a record of questions about a board that is described in text."""
    cells = [BLANK if digit is None else str(digit) for digit in board.digits]
    if board.marked is not None:
        cells[board.marked] = f"[{cells[board.marked]}]"
    return conversation(asked, f"{''.join(cells)}\n{shape_of(board)} ", [])


def about_several(boards: list[Board], images: list[str]) -> dict[str, Any]:
    """Make a record about several images of one digit."""
    question = Question(
        kind="image", text="Which digit is in the last image?", answer=str(boards[-1].digits[0])
    )
    return conversation([question], "<image>\n" * len(boards), images)


class Maker:
    """Makes boards from some scans and saves their pictures.

    Args:
        scans: the scans to use.
        seed: fixes everything.
        folder: where pictures go.
        prefix: start of the pictures' names.
    """

    def __init__(self, scans: Scans, seed: int, folder: Path, prefix: str):
        self.rng = np.random.default_rng(seed)
        self.scans = scans
        self.folder = folder
        self.prefix = prefix
        self.count = 0

    def board(self, shape: tuple[int, int] | None = None) -> tuple[Board, str]:
        """Make a board, save its image, and return both board and image name."""
        board = make_board(self.rng, self.scans, shape)
        name = f"{self.prefix}{self.count:05d}.png"
        board.picture.save(self.folder / name)
        self.count += 1
        return board, name

    def shuffled(self, asked: list[Question]) -> list[Question]:
        """Return the questions in random order."""
        return [asked[place] for place in self.rng.permutation(len(asked))]

    def records(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield records of all three kinds: with one image, several, none."""
        for _ in range(count):
            kind = self.rng.random()
            if kind < SEVERAL_SHARE:
                boards, names = zip(
                    *(self.board((1, 1)) for _ in range(int(self.rng.integers(2, 4)))), strict=True
                )
                yield about_several(list(boards), list(names))
            elif kind < SEVERAL_SHARE + TEXT_SHARE:
                yield self.text()
            else:
                board, name = self.board()
                asked = self.shuffled(questions(board))[: int(self.rng.integers(1, 4))]
                yield about_board(board, asked, name)

    def text(self) -> dict[str, Any]:
        """Make a record without images. It never asks for the position of the mark, which the text
        would give away.
        """
        board = make_board(self.rng, self.scans)
        asked = [
            question for question in questions(board) if question.kind not in ("row", "column")
        ]
        return about_text(board, self.shuffled(asked))

    def lone(self) -> dict[str, Any]:
        """Make a record about a single digit."""
        board, name = self.board((1, 1))
        return about_board(board, questions(board), name)

    def exam(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield single questions as a task of docs/evaluation.md, one in eight about several
        images.
        """
        for number in range(count):
            if number % 8 == 7:
                boards, names = zip(*(self.board((1, 1)) for _ in range(2)), strict=True)
                record = about_several(list(boards), list(names))
                kind = "image"
            else:
                board, name = self.board()
                [question, *_] = self.shuffled(questions(board))
                record = about_board(board, [question], name)
                kind = question.kind
            system, human, answer = (turn["value"] for turn in record["conversations"])
            names = [record["image"]] if isinstance(record["image"], str) else record["image"]
            yield {
                "category": kind,
                "image": [f"{self.folder.name}/{name}" for name in names],
                "system": system,
                "question": human,
                "answer": answer,
            }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE on the texts and the chat's roles, with its control tokens; every
    digit, space and bracket is a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"[0-9{BLANK}\\[\\]]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(
        vocab_size=VOCABULARY,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    roles = ["system", "user", "assistant"] * len(texts)
    tokenizer.train_from_iterator([*texts, *roles], trainers.BpeTrainer(**settings))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--records", type=int, default=24000, help="training records (default: %(default)s)"
    )
    parser.add_argument(
        "--texts",
        type=int,
        default=6000,
        help="records without pictures for the language part (default: %(default)s)",
    )
    parser.add_argument(
        "--lone",
        type=int,
        default=16000,
        help="records about a single digit (default: %(default)s)",
    )
    parser.add_argument(
        "--exam", type=int, default=400, help="held-out questions (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes everything (default: %(default)s)"
    )
    options = parser.parse_args()
    pictures = options.out / "images"
    pictures.mkdir(parents=True)
    train, held_out = split_scans(HELD_OUT_SCANS, options.seed)
    learner = Maker(train, options.seed + 1, pictures, "train")
    examiner = Maker(held_out, options.seed + 2, pictures, "exam")
    records = {
        "mixed_train.jsonl": list(learner.records(options.records)),
        "mixed_valid.jsonl": list(examiner.records(300)),
        "align_train.jsonl": [learner.lone() for _ in range(options.lone)],
        "align_valid.jsonl": [examiner.lone() for _ in range(300)],
        "text_train.jsonl": [learner.text() for _ in range(options.texts)],
        "text_valid.jsonl": [examiner.text() for _ in range(200)],
    }
    for name, content in records.items():
        write_lines(options.out / name, content)
    write_lines(options.out / "exam.jsonl", list(examiner.exam(options.exam)))
    texts = [
        turn["value"]
        for name in ("mixed_train.jsonl", "text_train.jsonl")
        for record in records[name]
        for turn in record["conversations"]
    ]
    train_tokenizer(texts, options.out / "tokenizer")
    print(
        f"{learner.count} pictures of {len(train)} scans to learn from, {examiner.count} of"
        f" {len(held_out)} other scans"
    )


if __name__ == "__main__":
    main()
