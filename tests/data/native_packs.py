"""Small packed datasets with images of any size, cut into tiles of their own size as Qwen2-VL's:
random words, between which images stand.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from megavlm.data.images.feature_layout import images_in_text
from megavlm.data.images.native import native_grid
from megavlm.data.sample import Image, Sample
from megavlm.data.store.index_format import round_up
from megavlm.data.store.manifest import Manifest
from tests.data.preference_packs import with_rejected
from tests.data.samples import write_packs

TILE = 28
CONTEXT = 500
BOUNDS = {"min_pixels": 784, "max_pixels": 10**6}
Size = tuple[int, int]
"""Width and height of an image in pixels."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video.

    Args:
        size: of its frames.
        frames: how many it has.
        apart: whether each pair of them is an image of its own in the text.
        interval: seconds from a pair to the next.
    """

    size: Size
    frames: int
    apart: bool = False
    interval: float = 1.0


Shown = Size | Clip
"""An image, or a video."""


def native_image(rng: np.random.Generator, size: Size, tile_size: int = TILE) -> Image:
    """Make a PNG of random coloured blocks, with the grid that it has."""
    width, height = size
    blocks = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    picture = Picture.fromarray(blocks).resize(size, Picture.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    columns, rows = native_grid(width, height, tile_size, **BOUNDS)
    return Image(
        encoded=file.getvalue(),
        width=width,
        height=height,
        columns=columns,
        rows=rows,
        tiles=columns * rows,
    )


def native_frames(rng: np.random.Generator, clip: Clip, tile_size: int = TILE) -> list[Image]:
    """Make the frames of a video."""
    frames = []
    for number in range(clip.frames):
        frame = native_image(rng, clip.size, tile_size)
        left = clip.frames - number
        frames.append(
            replace(
                frame,
                tiles=0 if number % 2 else frame.tiles,
                frames=min(left, 2 - number % 2) if clip.apart else left,
                interval=clip.interval,
            )
        )
    return frames


def native_sample(
    rng: np.random.Generator,
    shown: Sequence[Shown],
    *,
    line: int = 1,
    words: int = 12,
    tile_size: int = TILE,
    vocab_size: int = 512,
    context_token_id: int = CONTEXT,
) -> Sample:
    """Make a sample of random words whose second half is learned, two in front of each image, or of
    each video, or of each pair of its frames.
    """
    images: list[Image] = []
    for one in shown:
        is_clip = isinstance(one, Clip)
        images += (
            native_frames(rng, one, tile_size) if is_clip else [native_image(rng, one, tile_size)]
        )

    def text(count: int) -> np.ndarray:
        found = rng.integers(8, vocab_size - 1, count).astype(np.int32)
        return np.where(found >= context_token_id, found + 1, found)

    parts = []
    for group in images_in_text(images):
        tiles = sum(image.tiles for image in group)
        parts += [text(2), np.full(tiles, context_token_id, np.int32)]
    answer = words // 2
    tokens = np.concatenate([*parts, text(words)]).astype(np.int32)
    supervised = np.arange(len(tokens)) >= len(tokens) - answer
    return Sample(tokens=tokens, supervised=supervised, images=tuple(images), source=0, line=line)


def write_native(
    folder: Path,
    samples: Sequence[Sequence[Shown]],
    *,
    per_pack: int = 0,
    alignment: int = 1,
    preferences: bool = False,
    capacity: int = 0,
    seed: int = 0,
    tile_size: int = TILE,
    vocab_size: int = 512,
    context_token_id: int = CONTEXT,
    **facts: Any,
) -> Manifest:
    """Write a dataset of samples that show images of these sizes, and videos.

    Args:
        folder: of the dataset.
        samples: what each sample shows.
        per_pack: samples of a pack; 0: all.
        preferences: whether each sample has a rejected answer beside it.
        capacity: tokens of a pack; 0: as many as are needed.
        alignment, seed, tile_size, vocab_size, context_token_id: of the dataset.
        facts: others of its manifest.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(vocab_size=vocab_size, context_token_id=context_token_id, tile_size=tile_size)
    made = [
        native_sample(rng, images, line=line, words=8 + 3 * (line % 4), **sizes)
        for line, images in enumerate(samples, 1)
    ]
    if preferences:
        made = [with_rejected(sample, rng, 5, context_token_id) for sample in made]
    count = per_pack or len(made)
    packs = [made[first : first + count] for first in range(0, len(made), count)]
    most = max(
        sum(round_up(sample.extent(alignment), alignment) for sample in pack) for pack in packs
    )
    return write_packs(
        folder,
        packs,
        capacity=capacity or round_up(most, 2 * alignment) + 2 * alignment,
        alignment=alignment,
        seed=seed,
        features_per_tile=1,
        tiling="native",
        thumbnail=False,
        **BOUNDS,
        **sizes,
        **facts,
    )
