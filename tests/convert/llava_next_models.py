"""Small random models of LLaVA-NeXT and LLaVA-OneVision, as transformers saves them, and packs of
images for them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture
from megavlm.config.tiling import Mode
from megavlm.convert.hf import llava_next_config, llava_onevision_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.data.images.anyres import LLAVA_GRIDS, ONEVISION_GRIDS, USUAL_GRIDS, Grid
from megavlm.data.images.feature_layout import feature_layout
from megavlm.data.images.tiling import Tiling
from megavlm.data.sample import Image, Sample
from megavlm.data.store.manifest import Manifest
from tests.convert import llava_models
from tests.convert.models import ids_with, save_with_pixels, scattered
from tests.data.samples import write_packs

# Wide, tall, square, a grid that is filled up on two sides, and one whose rows are few.
SIZES = ((50, 20), (15, 40), (31, 31), (64, 45), (90, 7))
# The features of the last two are made fewer, of the last one also those of whole rows.
LARGE_SIZES = ((50, 20), (15, 40), (17, 16), (64, 45), (70, 90), (96, 96))


def with_newlines(architecture: Architecture) -> Architecture:
    """Return a LLaVA that ends rows of features."""
    return replace(architecture, connector=replace(architecture.connector, newline=True))


SMALL = with_newlines(llava_models.SMALL)
ONEVISION = with_newlines(
    replace(
        llava_models.SIGLIP["siglip, features of the last layer"],
        connector=llava_models.SMALL.connector,
        language=replace(llava_models.SMALL.language, family="qwen2", qkv_bias=True),
    )
)
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
    return _save(model, settings, folder, architecture)


def make_llava_onevision(
    folder: Path,
    architecture: Architecture = ONEVISION,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 631,
    spread: float = 0.2,
    grids: tuple[Grid, ...] = ONEVISION_GRIDS,
) -> Path:
    """``make_llava_next`` for LLaVA-OneVision."""
    ids = ids_with(image_token_id)
    settings = llava_onevision_config.write(architecture, grids, 632, ids, dtype)
    model = scattered(LlavaOnevisionForConditionalGeneration, settings, dtype, spread)
    return _save(model, settings, folder, architecture)


def _save(
    model: PreTrainedModel, settings: dict[str, Any], folder: Path, architecture: Architecture
) -> Path:
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


def make_image(
    rng: np.random.Generator,
    size: tuple[int, int],
    tile_size: int,
    mode: Mode = "anyres",
    images: int = 1,
) -> Image:
    """Make a noisy PNG, one of several of its sample, tiled as LLaVA-NeXT does."""
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Picture.fromarray(pixels).save(file, "PNG")
    tiling = Tiling(tile_size=tile_size, mode=mode, grids=USUAL_GRIDS[mode])
    columns, rows = tiling.grid(*size, images)
    return Image(
        encoded=file.getvalue(),
        width=size[0],
        height=size[1],
        columns=columns,
        rows=rows,
        tiles=tiling.count(columns, rows, images),
    )


def make_frames(rng: np.random.Generator, count: int, size: tuple[int, int]) -> list[Image]:
    """Make the frames of a video that is one image in the text."""
    frames = []
    for left in range(count, 0, -1):
        one = make_image(rng, size, tile_size=18, mode="anyres_max_9", images=2)
        frames.append(replace(one, frames=left))
    return frames


def make_anyres_sample(
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, ...]],
    *,
    text_tokens: int,
    line: int,
    vocab_size: int,
    context_token_id: int,
    tile_size: int,
    features_per_tile: int,
    mode: Mode = "anyres",
) -> Sample:
    """Make a sample of images of some sizes, and random text whose second half is supervised. A
    third number makes an image a video of so many frames.
    """
    layout = feature_layout(mode, features_per_tile)
    stills = sum(len(size) == 2 for size in sizes)
    images: tuple[Image, ...] = ()
    for width, height, *frames in sizes:
        if frames:
            images += tuple(make_frames(rng, *frames, (width, height)))
        else:
            images += (make_image(rng, (width, height), tile_size, mode, stills),)
    words = rng.integers(8, vocab_size, text_tokens)
    context = np.full(sum(map(layout.count, images)), context_token_id)
    tokens = np.concatenate([words[:1], context, words[1:]]).astype(np.int32)
    supervised = np.arange(len(tokens)) >= len(context) + text_tokens // 2
    return Sample(tokens=tokens, supervised=supervised, images=images, source=0, line=line)


def write_anyres(
    folder: Path, packs: list[list[Sample]], mode: Mode = "anyres", **settings: int
) -> Manifest:
    """Write packs as ``write_packs`` does, tiled as LLaVA-NeXT's."""
    written = write_packs(folder, packs, **settings)
    manifest = replace(written, tiling=mode, grids=USUAL_GRIDS[mode])
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
        made.append(_samples(rng, number, shown, **sizes))
    return write_anyres(folder, made, capacity=capacity, alignment=alignment, **sizes)


def make_onevision_packs(
    folder: Path, packs: int, capacity: int, alignment: int = 1, **sizes: int
) -> Manifest:
    """Write packs of samples with an image, none, two, or an image and a video, tiled as
    LLaVA-OneVision's; the features of an image of each second pack are made fewer.
    """
    rng = np.random.default_rng(5)
    made: list[list[Sample]] = []
    for number in range(packs):
        last = LARGE_SIZES[(5, 0, 4, 1)[number % 4]]
        shown = ((last,), (), LARGE_SIZES[:2], ((40, 30, 1 + number % 3), LARGE_SIZES[2]))
        made.append(_samples(rng, number, shown, mode="anyres_max_9", **sizes))
    mode = "anyres_max_9"
    return write_anyres(folder, made, mode, capacity=capacity, alignment=alignment, **sizes)


def _samples(
    rng: np.random.Generator,
    number: int,
    shown: Sequence[Sequence[tuple[int, ...]]],
    **facts: Any,
) -> list[Sample]:
    """Make the samples of a pack, of images of some sizes."""
    return [
        make_anyres_sample(
            rng,
            sizes,
            text_tokens=9 + number + 5 * place,
            line=len(shown) * number + place + 1,
            **facts,
        )
        for place, sizes in enumerate(shown)
    ]
