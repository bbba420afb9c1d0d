"""Small random LLaVA-NeXT models, as transformers saves them, and packs of images for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from transformers import LlavaNextForConditionalGeneration

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture
from megavlm.convert.hf import llava_next_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.data.images.anyres import LLAVA_GRIDS, Grid
from megavlm.data.images.feature_layout import feature_layout
from megavlm.data.images.tiling import Tiling
from megavlm.data.sample import Image, Sample
from megavlm.data.store.manifest import Manifest
from tests.convert import llava_models
from tests.convert.models import ids_with, save_with_pixels, scattered
from tests.data.samples import write_packs

# Wide, tall, square, a grid that is filled up on two sides, and one whose rows are few.
SIZES = ((50, 20), (15, 40), (31, 31), (64, 45), (90, 7))


def with_newlines(architecture: Architecture) -> Architecture:
    """Return a LLaVA that ends rows of features."""
    return replace(architecture, connector=replace(architecture.connector, newline=True))


SMALL = with_newlines(llava_models.SMALL)
LINEAR: Connector = replace(llava_models.LINEAR, newline=True)
KINDS = {
    name: with_newlines(architecture)
    for name, architecture in (llava_models.KINDS | llava_models.SIGLIP).items()
}


def make_llava_next(
    folder: Path,
    architecture: Architecture = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 631,
    spread: float = 0.2,
    grids: tuple[Grid, ...] = LLAVA_GRIDS,
) -> Path:
    """Write a random model whose every weight differs from its fresh value; the second layer of a
    linear connector stays an identity.
    """
    settings = llava_next_config.write(architecture, grids, ids_with(image_token_id), dtype)
    model = scattered(LlavaNextForConditionalGeneration, settings, dtype, spread)
    if architecture.connector.kind == "linear":
        second = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        if second.bias is not None:
            torch.nn.init.zeros_(second.bias)
    save_with_pixels(model, folder, architecture)
    path = folder / "preprocessor_config.json"
    own = {llava_next_config.PINPOINTS: settings[llava_next_config.PINPOINTS]}
    write_json(path, read_json(path) | own)
    return folder


def make_image(rng: np.random.Generator, size: tuple[int, int], tile_size: int) -> Image:
    """Make a noisy PNG, tiled as LLaVA-NeXT does."""
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Picture.fromarray(pixels).save(file, "PNG")
    tiling = Tiling(tile_size=tile_size, mode="anyres")
    columns, rows = tiling.grid(*size)
    return Image(
        encoded=file.getvalue(),
        width=size[0],
        height=size[1],
        columns=columns,
        rows=rows,
        tiles=tiling.count(columns, rows),
    )


def make_anyres_sample(
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]],
    *,
    text_tokens: int,
    line: int,
    vocab_size: int,
    context_token_id: int,
    tile_size: int,
    features_per_tile: int,
) -> Sample:
    """Make a sample of images of some sizes, and random text whose second half is supervised."""
    layout = feature_layout("anyres", features_per_tile)
    images = tuple(make_image(rng, size, tile_size) for size in sizes)
    words = rng.integers(8, vocab_size, text_tokens)
    context = np.full(sum(map(layout.count, images)), context_token_id)
    tokens = np.concatenate([words[:1], context, words[1:]]).astype(np.int32)
    supervised = np.arange(len(tokens)) >= len(context) + text_tokens // 2
    return Sample(tokens=tokens, supervised=supervised, images=images, source=0, line=line)


def write_anyres(folder: Path, packs: list[list[Sample]], **settings: int) -> Manifest:
    """Write packs as ``write_packs`` does, tiled as LLaVA-NeXT's."""
    manifest = replace(write_packs(folder, packs, **settings), tiling="anyres", grids=LLAVA_GRIDS)
    manifest.write(folder)
    return manifest


def make_anyres_packs(
    folder: Path, packs: int, capacity: int, alignment: int = 1, **sizes: int
) -> Manifest:
    """Write packs of samples with an image or none."""
    rng = np.random.default_rng(5)
    made: list[list[Sample]] = []
    for number in range(packs):
        shown = ((SIZES[number % len(SIZES)],), (), (SIZES[(number + 2) % len(SIZES)],))
        pack = []
        for place, images in enumerate(shown):
            facts = dict(text_tokens=9 + number + 5 * place, line=3 * number + place + 1)
            pack.append(make_anyres_sample(rng, images, **facts, **sizes))
        made.append(pack)
    return write_anyres(folder, made, capacity=capacity, alignment=alignment, **sizes)
