"""Real-size JPEG files for benchmarks, made from the two photographs that come with scikit-learn by
crops, sizes and qualities.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

# Sizes as in web data: most images between half a megapixel and one, some screens and some
# thumbnails.
LONG_SIDES = (320, 480, 640, 800, 1024, 1280, 1600)
SIDE_SHARES = (0.06, 0.12, 0.24, 0.22, 0.22, 0.10, 0.04)
WIDEST = 2460
ASPECT = 1.5  # of the photographs: high enough for images as high as the longest side
ASPECTS = (0.5, 0.66, 0.75, 1.0, 1.0, 1.33, 1.5, 1.78, 2.2)
WORDS = [
    "what",
    "who",
    "where",
    "is",
    "are",
    "on",
    "in",
    "the",
    "a",
    "of",
    "this",
    "photograph",
    "picture",
    "sky",
    "red",
    "blue",
    "flower",
    "petal",
    "roof",
    "temple",
    "people",
    "there",
    "how",
    "many",
]


def photographs() -> list[Image.Image]:
    """Load the photographs in several sizes, the largest big enough to cut images of any size
    from.
    """
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    widths = [round(WIDEST / 1.25**step) for step in range(7)]
    return [
        photo.resize((width, round(width / ASPECT)), Image.Resampling.LANCZOS)
        for photo in originals
        for width in widths
    ]


def draw_sizes(count: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Width, height and JPEG quality of ``count`` images."""
    rng = np.random.default_rng(seed)
    sides = rng.choice(LONG_SIDES, count, p=SIDE_SHARES)
    aspects = rng.choice(ASPECTS, count)
    for side, aspect, quality in zip(
        sides.tolist(), aspects.tolist(), rng.integers(75, 96, count).tolist(), strict=True
    ):
        width, height = (
            (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
        )
        yield width, height, quality


def write_jpegs(folder: Path, count: int, *, seed: int = 0, processes: int = 2) -> int:
    """Write ``0.jpg``, ``1.jpg``, ... and return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(folder, count, seed, first, processes) for first in range(processes)]
    with ProcessPoolExecutor(processes) as pool:
        return sum(pool.map(_write_part, parts))


def _write_part(part: tuple[Path, int, int, int, int]) -> int:
    folder, count, seed, first, step = part
    sources = photographs()
    size = 0
    for number, (width, height, quality) in enumerate(draw_sizes(count, seed)):
        if number % step != first:
            continue
        rng = random.Random(number)
        # A part of a photograph: of a large one a small part, of a small one up to all of it.
        source = rng.choice(
            [source for source in sources if source.width >= width and source.height >= height]
        )
        left = rng.randint(0, source.width - width)
        top = rng.randint(0, source.height - height)
        picture = source.crop((left, top, left + width, top + height))
        path = folder / f"{number}.jpg"
        picture.save(path, quality=quality)
        size += path.stat().st_size
    return size


def write_records(path: Path, images: int, *, seed: int = 0) -> None:
    """Write a JSONL file with a record of one question and one answer for each image."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(images):
            question, answer = (
                " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
                for low, high in ((5, 30), (5, 120))
            )
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            file.write(
                json.dumps({"id": number, "image": f"{number}.jpg", "conversations": turns}) + "\n"
            )
