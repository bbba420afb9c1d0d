"""Packs of JPEG photographs and text, made on the spot by the project's own packer: nothing is
downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megavlm.config.schema import Architecture
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_sources
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import chat_format

WORDS = [
    "a",
    "river",
    "under",
    "old",
    "trees",
    "with",
    "light",
    "on",
    "the",
    "water",
    "and",
    "two",
    "people",
    "walking",
    "past",
    "white",
    "houses",
    "while",
    "rain",
    "is",
    "near",
]
VOCABULARY = 480
QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class PackSizes:
    """How much is made.

    Args:
        capacity: tokens of a pack.
        packs: packs to measure on.
        max_tiles: most tiles of an image, thumbnail not counted.
        tile_cap: most tiles of a pack; none: chosen from the data.
        least_side, most_side: of the images, in pixels.
    """

    capacity: int
    packs: int
    max_tiles: int
    tile_cap: int | None
    least_side: int
    most_side: int


# 48 is InternVL's own cap, and a multiple of 16: few tiles are blank.
REAL = PackSizes(capacity=16384, packs=8, max_tiles=12, tile_cap=48, least_side=300, most_side=1600)
SMOKE = PackSizes(capacity=512, packs=2, max_tiles=3, tile_cap=None, least_side=32, most_side=96)


def make_packs(
    folder: Path,
    architecture: Architecture,
    sizes: PackSizes,
    seed: int = 0,
    template: str = DEFAULT,
) -> PackedDataset:
    """Photographs, questions, a tokenizer, and packs of them in ``folder / "packs"``, for every
    model with the same tiles and conversations of this template.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    # More than is needed, since only the fullest packs are taken.
    features = architecture.placeholders_per_tile
    wanted = int(1.25 * (sizes.packs + 1) * sizes.capacity)
    records = []
    tokens = 0
    size = architecture.vision.image_size
    is_native = architecture.vision.spans_tiles
    tiling = Tiling(
        tile_size=size,
        mode="native" if is_native else "dynamic",
        max_tiles=sizes.max_tiles,
        max_pixels=1280 * size**2,
    )
    for number, picture in enumerate(photographs(rng, sizes)):
        seen = tiling.count(*tiling.grid(*picture.size)) * features
        name = f"{number:04d}.jpg"
        picture.save(images / name, quality=QUALITY)
        # In mixtures for instruction tuning some three quarters of the tokens are images'.
        answer = " ".join(rng.choice(WORDS, int(seen * rng.uniform(0.18, 0.5)) + 8))
        turns = [
            {"from": "human", "value": "<image>\nWhat is there?"},
            {"from": "gpt", "value": answer},
        ]
        records.append(json.dumps({"image": name, "conversations": turns}))
        tokens += seen + len(answer.split())
        if tokens > wanted:
            break
    (folder / "records.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    make_tokenizer(folder / "tokenizer")
    pack_dataset(
        Job(
            sources=read_sources(None, str(folder / "records.jsonl"), str(images)),
            tokenizer=str(folder / "tokenizer"),
            out=str(folder / "packs"),
            capacity=sizes.capacity,
            features_per_tile=features,
            template=template,
            tiling=tiling,
            tile_cap=None if is_native else sizes.tile_cap,
            decode_images=False,
            seed=seed,
        )
    )
    return PackedDataset(folder / "packs")


def fullest(packs: PackedDataset, count: int) -> list[int]:
    """Ids of the ``count`` packs with the fewest tokens of padding, in their order."""
    tokens = packs.index[np.arange(len(packs))]["tokens"]
    return sorted(np.argsort(-tokens, kind="stable")[:count].tolist())


def photographs(rng: np.random.Generator, sizes: PackSizes) -> Iterator[Image.Image]:
    """Pieces of photographs in many sizes and shapes, without end."""
    sources = _sources(rng)
    while True:
        source = sources[int(rng.integers(len(sources)))]
        shape = 2 ** rng.uniform(-1, 1)
        width = min(source.width, int(source.height * shape)) * rng.uniform(0.5, 1)
        height = width / shape
        left = rng.uniform(0, source.width - width)
        top = rng.uniform(0, max(source.height - height, 0))
        piece = source.crop((int(left), int(top), int(left + width), int(top + height)))
        side = 2 ** rng.uniform(np.log2(sizes.least_side), np.log2(sizes.most_side))
        target = (
            max(int(side * min(1, shape)), sizes.least_side // 2),
            max(int(side * min(1, 1 / shape)), sizes.least_side // 2),
        )
        yield piece.resize(target, Image.Resampling.BICUBIC)


def _sources(rng: np.random.Generator) -> list[Image.Image]:
    """scikit-learn's two photographs; without it, soft blots with grain, which cost a decoder about
    as much.
    """
    try:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(pixels) for pixels in load_sample_images().images]
    except (ImportError, OSError):
        return [_blots(rng) for _ in range(4)]


def _blots(rng: np.random.Generator) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 427), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 8, (427, 640, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def make_tokenizer(folder: Path) -> None:
    """Train a small byte-level BPE with the control tokens that the chat template needs."""
    # Only here: processes that measure choose packs, and do without these.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        " ".join(WORDS),
        "system user assistant What is there?",
        chat_format("internvl2_5").system_message,
    ]
    tokenizer.train_from_iterator(texts * 10, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
