"""Make images of coloured shapes with captions, more of them of which a tenth have the caption of
another image, and a tokenizer of their words.

python examples/contrastive/make_data.py OUT
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SIDE = 32
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 4, "large": 7}
PLACES = {"top left": (9, 9), "top right": (22, 9), "lower left": (9, 22), "lower right": (22, 22)}
TRAINING_IMAGES = 4800
MIXED_IMAGES = 960
WRONG_IMAGES = MIXED_IMAGES // 10
FACTS = tuple(itertools.product(SIZES, COLOURS, SHAPES, PLACES))


def draw(facts: tuple[str, str, str, str], rng: np.random.Generator) -> Image.Image:
    """Draw a shape, moved and stretched a little."""
    size, colour, shape, place = facts
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(shade) for shade in rng.integers(0, 60, 3)))
    radius = SIZES[size]
    x, y = (centre + int(rng.integers(-2, 3)) for centre in PLACES[place])
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
    else:
        pen.line((x - radius, y, x + radius, y), fill=colour, width=3)
        pen.line((x, y - radius, x, y + radius), fill=colour, width=3)
    return image


def write(
    out: Path,
    name: str,
    chosen: list[tuple[str, str, str, str]],
    seed: int,
    told: list[tuple[str, str, str, str]] | None = None,
) -> None:
    """Write an annotation file and its images, which show what is chosen; captions say what is
    told, or the same.
    """
    rng = np.random.default_rng(seed)
    with (out / f"{name}.jsonl").open("w") as lines:
        for number, (facts, words) in enumerate(zip(chosen, told or chosen, strict=True)):
            image = f"{name}_{number}.png"
            draw(facts, rng).save(out / "images" / image)
            turns = [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": caption(words)},
            ]
            lines.write(json.dumps({"image": image, "conversations": turns}) + "\n")


def caption(facts: tuple[str, str, str, str]) -> str:
    """Return what is told of an image."""
    size, colour, shape, place = facts
    return f"a {size} {colour} {shape} at the {place}"


def write_tokenizer(folder: Path, others: tuple[str, ...] = ("a", "at", "the")) -> None:
    """Write a tokenizer with a token for each word of the facts and each other one, and one before
    and one after a text.
    """
    words = sorted({word for facts in FACTS for text in facts for word in text.split()})
    names = (*others, *words, "<unk>", "<|startoftext|>", "<|endoftext|>")
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("<|startoftext|>", "<|endoftext|>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=ends
    )
    start, end = (name for name, _ in ends)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=start, eos_token=end, pad_token=end
    ).save_pretrained(folder)


def write_pairs(out: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    """Write images for training and for validation, of which those show everything once, each with
    its annotation file; return what they show.
    """
    (out / "images").mkdir(parents=True)
    chosen = np.random.default_rng(1).integers(0, len(FACTS), TRAINING_IMAGES)
    shown = {"train": [FACTS[number] for number in chosen], "valid": list(FACTS)}
    for seed, (name, facts) in enumerate(shown.items(), start=2):
        write(out, name, facts, seed=seed)
    return shown


def write_mixed(out: Path) -> None:
    """Write images of which a tenth have the caption of another one that shows something else, and
    the numbers of these, from 0.
    """
    rng = np.random.default_rng(5)
    shown = [FACTS[number] for number in rng.integers(0, len(FACTS), MIXED_IMAGES)]
    wrong = rng.choice(MIXED_IMAGES, WRONG_IMAGES, replace=False).tolist()
    wrong.sort(key=lambda number: shown[number])
    told = list(shown)
    for place, number in enumerate(wrong):
        # Half of them on: nothing is shown so often.
        told[number] = shown[wrong[(place + WRONG_IMAGES // 2) % WRONG_IMAGES]]
    assert all(told[number] != shown[number] for number in wrong)
    write(out, "mixed", shown, seed=6, told=told)
    (out / "mixed_wrong.json").write_text(json.dumps(sorted(wrong)) + "\n")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_pairs(out)
    write_mixed(out)
    write_tokenizer(out / "tokenizer")
