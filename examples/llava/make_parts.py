"""Make what LLaVA starts from, small: boards of one or two handwritten digits with questions about
them, videos of them on request, a CLIP that has learned to read such boards, and a language model
that has learned nothing.

python examples/llava/make_parts.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from boards import Board, Scans, make_board, questions, split_scans
from make_data import HELD_OUT_SCANS, train_tokenizer, write_lines
from try_out import parse_parts

from megavlm.config.vision import PIXELS
from megavlm.data.images.tiling import pad_colour
from megavlm.data.images.transforms import to_square

SHAPES = ((1, 1), (1, 2), (2, 1))
SIDE = 32  # pixels of a tile
PLACES = ("first", "second", "last")  # of a digit in a video, a frame each
EMPTY = 10  # what CLIP learns to say of an empty cell; digits are 0 to 9
MEAN, STD = PIXELS["clip"]
CLIP = CLIPVisionConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=8,
)


def a_board(rng: np.random.Generator, scans: Scans) -> Board:
    """Make a board of one or two cells."""
    return make_board(rng, scans, SHAPES[int(rng.integers(len(SHAPES)))])


def write_records(
    rng: np.random.Generator, scans: Scans, count: int, folder: Path, name: str
) -> list[dict[str, Any]]:
    """Save pictures and return captions and questions about them, in LLaVA's format."""
    records = []
    for number in range(count):
        board = a_board(rng, scans)
        picture = f"{name}{number:05d}.png"
        board.picture.save(folder / picture)
        digits = " ".join("_" if digit is None else str(digit) for digit in board.digits)
        asked = questions(board)
        turns = []
        for place in rng.permutation(len(asked))[:2]:
            turns.append({"from": "human", "value": asked[place].text})
            turns.append({"from": "gpt", "value": asked[place].answer})
        turns[0]["value"] = f"{turns[0]['value']}\n<image>"
        records.append({"image": picture, "conversations": turns, "caption": digits})
    return records


def save_frames(pictures: list[Image.Image], path: Path) -> Path:
    """Save pictures as a folder of frames, and return it."""
    path.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(path / f"{number}.png")
    return path


def write_videos(
    rng: np.random.Generator,
    scans: Scans,
    count: int,
    folder: Path,
    name: str,
    save: Callable[[list[Image.Image], Path], Path] = save_frames,
) -> list[dict[str, Any]]:
    """Save videos of one digit after the other, and return questions about them.

    Args:
        rng: draws digits.
        scans: of digits.
        count: of videos.
        folder: to save in.
        name: their names begin with it.
        save: saves the pictures of a video, by a path without an ending, and returns its own.
    """
    records = []
    for number in range(count):
        boards = [make_board(rng, scans, (1, 1)) for _ in PLACES]
        digits = [str(board.digits[0]) for board in boards]
        video = save([board.picture for board in boards], folder / f"{name}{number:05d}")
        asked = [
            ("Which digits come?", " ".join(digits)),
            *((f"Which digit comes {PLACES[i]}?", digit) for i, digit in enumerate(digits)),
        ]
        turns = []
        for index in rng.permutation(len(asked)):
            question, answer = asked[index]
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": answer})
        turns[0]["value"] = f"<video>\n{turns[0]['value']}"
        records.append({"video": video.name, "conversations": turns})
    return records


def as_captions(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of stage 1: a request that nobody sees, and the digits of the board."""
    return [
        {
            "image": record["image"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is written here?"},
                {"from": "gpt", "value": record["caption"]},
            ],
        }
        for record in records
    ]


def one_question_each(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for each question, for models that take one, without line breaks at the
    image.
    """
    return [
        {
            "image": record["image"],
            "conversations": [
                {"from": "human", "value": "<image>" + asked["value"].replace("<image>", "")},
                answer,
            ],
        }
        for record in records
        for asked, answer in zip(
            record["conversations"][::2], record["conversations"][1::2], strict=True
        )
    ]


def pixels_of(board: Board) -> np.ndarray:
    """Return a board's pixels as stage 2 sees them, uint8 [3, S, S]."""
    square = to_square(board.picture, pad_colour("pad", MEAN)).resize((SIDE, SIDE), 3)
    return np.asarray(square).transpose(2, 0, 1)


def train_encoder(
    make: Callable[[], PreTrainedModel],
    pool: Callable[[Tensor], Tensor],
    pixels_of: Callable[[Board], np.ndarray],
    normalisation: tuple[Sequence[float], Sequence[float]],
    rng: np.random.Generator,
    scans: Scans,
    steps: int,
    folder: Path,
) -> float:
    """Train a vision encoder to say which digits are on boards, save it, and return its share of
    right cells in the last steps.

    Args:
        make: makes the fresh encoder.
        pool: makes a row of each image [I, D] from its last hidden states [I, tokens, D].
        pixels_of: gives a board's pixels, uint8 [3, S, S].
        normalisation: mean and standard deviation of pixels.
        rng: draws boards.
        scans: for the boards.
        steps: of training.
        folder: to save in.
    """
    torch.manual_seed(0)
    model = make()
    head = nn.Linear(model.config.hidden_size, 2 * (EMPTY + 1))
    boards = [a_board(rng, scans) for _ in range(3000)]
    pixels = torch.from_numpy(np.stack([pixels_of(board) for board in boards]))
    cells = [[*board.digits, None][:2] for board in boards]
    labels = torch.tensor([[EMPTY if digit is None else digit for digit in cell] for cell in cells])
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1)
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation)
    right: list[Tensor] = []
    for _ in range(steps):
        chosen = torch.from_numpy(rng.integers(len(boards), size=64))
        seen = (pixels[chosen].float() / 255 - mean) / std
        told = head(pool(model(seen).last_hidden_state)).unflatten(-1, (2, EMPTY + 1))
        loss = nn.functional.cross_entropy(told.flatten(0, 1), labels[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((told.argmax(-1) == labels[chosen]).float().mean())
    model.save_pretrained(folder)
    settings = dict(zip(("image_mean", "image_std"), map(list, normalisation), strict=True))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return float(torch.stack(right[-50:]).mean())


def train_clip(rng: np.random.Generator, scans: Scans, steps: int, folder: Path) -> float:
    """Train a CLIP, from its class token; see ``train_encoder``."""
    return train_encoder(
        lambda: CLIPVisionModel(CLIP),
        lambda hidden: hidden[:, 0],
        pixels_of,
        (MEAN, STD),
        rng,
        scans,
        steps,
        folder,
    )


def make_language(words: list[str], folder: Path) -> None:
    """Write a fresh language model and its tokenizer."""
    train_tokenizer(words, folder)
    torch.manual_seed(1)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, vocab_size=500)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=2048))
    model.save_pretrained(folder)


def main() -> None:
    options = parse_parts(__doc__, records=3000, exam=200, videos=0, video_exam=0, clip_steps=500)
    images = options.out / "images"
    images.mkdir(parents=True)
    train, held_out = split_scans(HELD_OUT_SCANS, 0)
    learned = write_records(np.random.default_rng(1), train, options.records, images, "train")
    exam = write_records(np.random.default_rng(2), held_out, options.exam, images, "exam")
    write_lines(options.out / "stage1.jsonl", as_captions(learned))
    watched = write_videos(np.random.default_rng(4), train, options.videos, images, "video")
    unseen = write_videos(np.random.default_rng(5), held_out, options.video_exam, images, "unseen")
    for name, records in (
        ("stage2", learned),
        ("stage3", watched + learned[: options.videos // 4]),
        ("exam", exam),
        ("video_exam", unseen),
    ):
        write_lines(
            options.out / f"{name}.jsonl",
            [{key: record[key] for key in record if key != "caption"} for record in records],
        )
    texts = [turn["value"] for record in learned + watched for turn in record["conversations"]]
    make_language(texts, options.out / "language")
    share = train_clip(np.random.default_rng(3), train, options.clip_steps, options.out / "clip")
    print(f"{len(learned)} records, {len(exam)} for the exam; CLIP reads {share:.0%} of the cells")


if __name__ == "__main__":
    main()
