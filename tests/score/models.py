"""Small models of two encoders with a tokenizer, images with captions, and the embeddings that
transformers gives them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipImageProcessorPil,
    SiglipModel,
)

from tests.convert.pair_models import SIDE, make_pair_model
from tests.data.pair_tokenizer import make_pair_tokenizer

WORDS = ("a", "b", "red", "green", "dog", "cat", "at", "home")
LENGTH = 12


def make_towers(folder: Path, kind: str) -> Path:
    """Write a random ``clip`` or ``siglip`` with its tokenizer and image processor."""
    end = len(WORDS) + 2
    model = make_pair_model(
        kind, vocab_size=end + 1, positions=LENGTH, begin=end - 1, end=end, noise=0.1
    )
    model.save_pretrained(folder)
    make_pair_tokenizer(folder, WORDS)
    if kind == "clip":
        crop = {"height": SIDE, "width": SIDE}
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    else:
        size = {"height": SIDE, "width": SIDE}
        SiglipImageProcessorPil(size=size, resample=2).save_pretrained(folder)
    return folder


def make_image(path: Path, seed: int) -> Path:
    """Write an image of a few random blocks, of a random shape. It is wide: Pillow 13 resizes high
    images along columns first, and older ones and ours along rows, which rounds otherwise.
    """
    rng = np.random.default_rng(seed)
    size = sorted(rng.integers(20, 60, 2).tolist(), reverse=True)
    blocks = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    blocks.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def caption(seed: int) -> str:
    """Return a few random words, sometimes more than the encoder has positions for."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, rng.integers(2, LENGTH + 4)))


def make_captions(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write images; return a record of each, with a caption."""
    folder.mkdir(exist_ok=True)
    names = [make_image(folder / f"{number}.png", number).name for number in range(count)]
    return [{"image": name, "caption": caption(number)} for number, name in enumerate(names)]


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def embeddings_of_transformers(
    folder: Path, kind: str, images: list[Path], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of images and texts, of length one, as transformers gives them."""
    model = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil
    pixels = [
        processor.from_pretrained(folder)(Image.open(path), return_tensors="pt")["pixel_values"]
        for path in images
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filled = dict(padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    tokens = tokenizer(texts, **filled)
    seen = {"attention_mask": tokens["attention_mask"]} if kind == "clip" else {}
    with torch.no_grad():
        found = model(input_ids=tokens["input_ids"], pixel_values=torch.cat(pixels), **seen)
    return found.image_embeds.numpy(), found.text_embeds.numpy()
