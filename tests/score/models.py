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
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from tests.data.pair_tokenizer import make_pair_tokenizer

WORDS = ("a", "b", "red", "green", "dog", "cat", "at", "home")
LENGTH = 12
_VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
_TEXT = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=len(WORDS) + 3,
    max_position_embeddings=LENGTH,
    bos_token_id=len(WORDS) + 1,
    eos_token_id=len(WORDS) + 2,
    pad_token_id=len(WORDS) + 2,
)


def make_towers(folder: Path, kind: str) -> Path:
    """Write a random ``clip`` or ``siglip`` with its tokenizer and image processor."""
    torch.manual_seed(5)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=20))
    else:
        text = _TEXT | {"projection_size": 32}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_pair_tokenizer(folder, WORDS)
    side = _VISION["image_size"]
    if kind == "clip":
        crop = {"height": side, "width": side}
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    else:
        size = {"height": side, "width": side}
        SiglipImageProcessorPil(size=size, resample=3).save_pretrained(folder)
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
