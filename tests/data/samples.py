"""Small packed datasets of random samples, written straight through ``ShardWriter``: no tokenizer
is needed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from megavlm.config.schema import Config, Data, Training
from megavlm.data.sample import Image, Sample
from megavlm.data.store.index_format import round_up
from megavlm.data.store.manifest import Level, Manifest, Shard, Source, Totals
from megavlm.data.store.pack_format import PackRules, ShardWriter, complete

_SHARD_BYTES = 2**30
GRIDS = ((1, 1), (2, 1), (1, 2), (3, 1))


def make_image(rng: np.random.Generator, tile_size: int, columns: int, rows: int) -> Image:
    """Make a PNG of random coloured blocks that fills its tiles; several tiles come with a
    thumbnail.
    """
    blocks = rng.integers(0, 256, (4 * rows, 4 * columns, 3), dtype=np.uint8)
    picture = Picture.fromarray(blocks).resize(
        (columns * tile_size, rows * tile_size), Picture.Resampling.NEAREST
    )
    return as_png(picture, columns, rows)


def as_png(picture: Picture.Image, columns: int = 1, rows: int = 1) -> Image:
    """Make an image of a picture that fills its tiles; several tiles come with a thumbnail."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    count = columns * rows
    return Image(
        encoded=file.getvalue(),
        width=picture.width,
        height=picture.height,
        columns=columns,
        rows=rows,
        tiles=count + (1 if count > 1 else 0),
    )


def make_sample(
    rng: np.random.Generator,
    *,
    vocab_size: int,
    context_token_id: int,
    tile_size: int,
    features_per_tile: int,
    images: int,
    text_tokens: int,
    line: int,
    grids: tuple[tuple[int, int], ...] = GRIDS,
    source: int = 0,
    instruction_tokens: int = 0,
    instruction_vocab: int = 61,
) -> Sample:
    """Random text whose second half is supervised, after the context tokens of some images. Ids 0
    and 1 are left for padding and such. A Q-Former reads ``instruction_tokens`` of a vocabulary of
    its own.
    """
    pictures = tuple(
        make_image(rng, tile_size, *grids[rng.integers(len(grids))]) for _ in range(images)
    )
    words = rng.integers(2, vocab_size, text_tokens)
    words[words == context_token_id] = 2 if context_token_id != 2 else 3
    context = np.full(
        sum(picture.tiles for picture in pictures) * features_per_tile, context_token_id
    )
    tokens = np.concatenate([words[:1], context, words[1:]]).astype(np.int32)
    supervised = np.zeros(len(tokens), bool)
    supervised[len(context) + text_tokens // 2 :] = True
    asked = (np.arange(instruction_tokens) * 7 + line) % (instruction_vocab - 1) + 1
    return Sample(
        tokens=tokens,
        supervised=supervised,
        images=pictures,
        source=source,
        line=line,
        instruction=asked.astype(np.int32),
    )


def make_dataset(
    folder: Path,
    *,
    packs: int = 8,
    samples_per_pack: int = 3,
    image_share: float = 0.5,
    vocab_size: int = 512,
    context_token_id: int = 500,
    tile_size: int = 32,
    features_per_tile: int = 16,
    capacity: int = 256,
    alignment: int = 1,
    text_tokens: tuple[int, int] = (8, 40),
    shard_bytes: int = _SHARD_BYTES,
    seed: int = 0,
    grids: tuple[tuple[int, int], ...] = GRIDS,
    levels: tuple[int, ...] = (),
    sources: tuple[str, ...] = ("random",),
    instruction_length: int = 0,
) -> Manifest:
    """Write a packed dataset of random samples; the same arguments give the same bytes.

    A sample has an image with the chance ``image_share`` (0: text only). Samples that do not fit
    into what is left of a pack lose their image, or are dropped, so a pack has 1 to
    ``samples_per_pack`` of them. They are of the ``sources`` in turn; ``levels`` says how many
    packs are of each level of difficulty.
    """
    rng = np.random.default_rng(seed)
    facts = dict(vocab_size=vocab_size, context_token_id=context_token_id)
    facts |= dict(tile_size=tile_size, features_per_tile=features_per_tile)
    lines = iter(range(1, packs * samples_per_pack + 1))

    def fill_pack() -> list[Sample]:
        pack: list[Sample] = []
        for line in itertools.islice(lines, samples_per_pack):
            images = int(rng.random() < image_share)
            words = int(rng.integers(*text_tokens))
            fixed = dict(text_tokens=words, grids=grids, line=line, source=line % len(sources))
            fixed["instruction_tokens"] = line % (instruction_length + 1)
            used = sum(round_up(sample.length, alignment) for sample in pack)
            for count in range(images, -1, -1):
                sample = make_sample(rng, images=count, **fixed, **facts)
                if used + round_up(sample.length, alignment) <= capacity:
                    pack.append(sample)
                    break
        return pack

    chosen = [fill_pack() for _ in range(packs)]
    return write_packs(
        folder,
        chosen,
        capacity=capacity,
        alignment=alignment,
        shard_bytes=shard_bytes,
        seed=seed,
        levels=levels,
        sources=sources,
        instruction_length=instruction_length,
        **facts,
    )


def write_packs(
    folder: Path,
    packs: list[list[Sample]],
    *,
    vocab_size: int,
    context_token_id: int,
    tile_size: int,
    features_per_tile: int,
    capacity: int,
    alignment: int = 1,
    shard_bytes: int = _SHARD_BYTES,
    seed: int = 0,
    levels: tuple[int, ...] = (),
    sources: tuple[str, ...] = ("random",),
    end_token_id: int = -1,
    instruction_length: int = 0,
    **facts: Any,
) -> Manifest:
    """Write the given samples as the packs of a dataset; ``facts`` are others of its manifest."""
    lines = max(sample.line for pack in packs for sample in pack)
    manifest = Manifest(
        tokenizer_fingerprint=f"random-{vocab_size}",
        vocab_size=vocab_size,
        context_token_id=context_token_id,
        end_token_id=end_token_id,
        instruction_length=instruction_length,
        template="internvl2_5",
        image_size=tile_size,
        features_per_tile=features_per_tile,
        max_tiles=3,
        capacity=capacity,
        tile_cap=max(sum(sample.tiles for sample in pack) for pack in packs),
        alignment=alignment,
        seed=seed,
        sources=tuple(
            Source(name=name, annotations=f"{name}.jsonl", records=lines, samples=lines)
            for name in sources
        ),
        levels=tuple(
            Level(packs=count, easiest=place, hardest=place) for place, count in enumerate(levels)
        ),
        preferences=packs[0][0].rejected is not None,
        **facts,
    )
    return store_packs(folder, packs, manifest, shard_bytes=shard_bytes)


def store_packs(
    folder: Path,
    packs: Iterable[Sequence[Sample]],
    manifest: Manifest,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> Manifest:
    """Write packs by the manifest's rules, a new shard whenever one has reached ``shard_bytes``,
    and complete the dataset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rules = PackRules(
        capacity=manifest.capacity,
        tile_cap=manifest.tile_cap,
        alignment=manifest.alignment,
        preferences=manifest.preferences,
    )
    shards: list[tuple[Shard, Totals]] = []
    with ExitStack() as stack:
        shard = stack.enter_context(ShardWriter(folder, 0, rules))
        for pack in packs:
            if shard.packs and shard.bytes >= shard_bytes:
                shards.append(shard.close())
                shard = stack.enter_context(ShardWriter(folder, len(shards), rules))
            shard.write(pack)
        shards.append(shard.close())
    completed = complete(folder, manifest, shards)
    for records in folder.glob("*.records"):
        records.unlink()
    return completed


def run_over(folders: Sequence[str], *, seed: int, batch: int = 512, **data: Any) -> Config:
    """Return a run over folders of packs, with so many packs a step; packs of unlike cost are drawn
    together, unless ``data``, other fields of ``Data``, says otherwise.
    """
    return Config(
        stage="2",
        model="tiny",
        data=Data(train=",".join(folders), **{"group": 1, "strata": 1} | data),
        training=Training(seed=seed, global_batch_size=batch),
    )
