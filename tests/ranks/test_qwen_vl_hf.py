"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against ``transformers``: logits and losses of packs with
images of several sizes, and the tool that compares an export with its checkpoint.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megavlm.config.lora import Lora
from megavlm.config.schema import Architecture, Config
from megavlm.config.tiling import VideoPixels
from megavlm.convert.hf import convert
from megavlm.convert.hf.reference import load_reference, shown_pixels, tile_inputs
from megavlm.convert.hf.reference_videos import with_videos
from megavlm.data.images.feature_layout import as_tiled
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.reader import Reader
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer
from tests.convert.hf.test_peft import checkpoint_of
from tests.convert.part_folders import make_tokenizer
from tests.convert.qwen_vl_models import (
    KINDS,
    SMALL,
    SMALL_2,
    SMALL_3,
    SMALL_3_MOE,
    kind_of,
    make_qwen_vl,
)
from tests.data.native_packs import Clip, Shown, Size, native_image, write_native
from tests.ranks.model_checks import (
    CONTEXT,
    answers_of_transformers,
    assert_equals_transformers,
    pack_records,
    recipe_config,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING


def shown(tile: int, *, apart: bool = False) -> tuple[tuple[Shown, ...], ...]:
    """Return what samples show, for tiles of so many pixels: images of whole windows, such that an
    edge cuts on both sides or on one, one tile, none; videos of odd numbers of frames, at times
    that are no whole numbers, beside images and each other, and of more frames than rows or
    columns. ``apart`` says whether pairs of frames are images of their own in the text.
    """

    def sized(columns: int, rows: int) -> Size:
        return tile * columns - 1, tile * rows + 1

    clip = partial(Clip, apart=apart)
    return (
        (sized(4, 4),),
        (sized(5, 3), sized(3, 7)),
        (),
        (sized(1, 1),),
        (sized(6, 5), clip(size=sized(5, 3), frames=5, interval=0.55), sized(2, 1)),
        (clip(size=sized(3, 4), frames=2), clip(size=sized(2, 3), frames=11, interval=2.3)),
        (clip(size=sized(3, 2), frames=1),),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    tile = architecture.vision.image_size
    facts = dict(vocab_size=architecture.language.vocab_size, context_token_id=CONTEXT)
    third = architecture.vision.family == "qwen3_vl"
    write_native(packs, shown(tile, apart=third), tile_size=tile, **facts)
    folder = make_qwen_vl(tmp_path / "hf", architecture, torch.float32)
    expected = answers_of_transformers(folder, packs, architecture)
    recipe = architecture.vision.family
    configure = partial(recipe_config, recipe, architecture, packs, trainable=EVERYTHING)
    assert_equals_transformers(ranks, configure, folder, expected)


# Names in transformers of weights at the beginning and the end of each part.
GRADIENTS = {
    "vision.patch_embedding.weight": "model.visual.patch_embed.proj.weight",
    "vision.encoder.layers.0.self_attention.linear_proj.weight": (
        "model.visual.blocks.0.attn.proj.weight"
    ),
    "connector.norm.weight": "model.visual.merger.ln_q.weight",
    "connector.mlp.linear_fc2.weight": "model.visual.merger.mlp.2.weight",
    "language.decoder.layers.0.mlp.linear_fc2.weight": (
        "model.language_model.layers.0.mlp.down_proj.weight"
    ),
}


def gradients(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """Return those of the first pack, in float32."""
    from megavlm.model import weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs
    from tests.ranks.runs import build

    job = build(config)
    weights.fill(job.chunks, convert.full_tensors(folder, config.architecture))
    batch = job.train.batch(0, 0, job.batch_options)
    run_packs(job.ddp_chunks, Microbatches(iter([batch]), 1, batch.weight_sum), job.backend)
    named = weights.named_weights(job.chunks[0])
    return {name: named[name].main_grad.clone() for name in GRADIENTS}


@pytest.mark.parametrize("architecture", [SMALL, SMALL_2], ids=["2.5", "2"])
def test_gradients_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, architecture: Architecture
) -> None:
    packs = tmp_path / "packs"
    tile = architecture.vision.image_size
    facts = dict(vocab_size=architecture.language.vocab_size, context_token_id=CONTEXT)
    clip = Clip(size=(3 * tile, 4 * tile), frames=3, interval=0.7)
    write_native(packs, [((5 * tile, 3 * tile), clip)], tile_size=tile, **facts)
    folder = make_qwen_vl(tmp_path / "hf", architecture, torch.float32)
    config = recipe_config(architecture.vision.family, architecture, packs, trainable=EVERYTHING)
    [found] = ranks.run(gradients, 1, config, folder)
    model = load_reference(folder)
    dataset = PackedDataset(packs)
    batch = dataset.batch(0, 0)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    count = int(batch.sample_ends[1])
    pixels = (shown_pixels(dataset, 0).float() / 255 - mean) / std
    images = as_tiled(dataset.reader.read(0).images)
    inputs = tile_inputs(model, pixels, images, batch.tokens[:count])
    inputs["input_ids"] = batch.tokens[None, :count]
    logits = model(**with_videos(model, inputs, images, dataset.layout)).logits[0]
    losses = cross_entropy(logits, batch.labels[:count], reduction="none")
    weights = batch.loss_weights[:count]
    (losses * weights).sum().div(weights.sum()).backward()
    theirs = dict(model.named_parameters())
    for name, other in GRADIENTS.items():
        expected = theirs[other].grad
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name].view_as(expected), expected, rtol=1e-4, atol=1e-6)


def write_records(folder: Path, tile: int) -> Path:
    """Write records with images and videos, one or several, or none, and their files."""
    rng = np.random.default_rng(3)
    records = []
    for line, sizes in enumerate(shown(tile)):
        media: dict[str, list[str]] = {"image": [], "video": []}
        asked = ""
        for number, one in enumerate(sizes):
            is_video = isinstance(one, Clip)
            name = f"{line}-{number}" + ("" if is_video else ".png")
            media["video" if is_video else "image"].append(name)
            asked += "<video>\n" if is_video else "<image>\n"
            if is_video:  # a folder of frames, a second apart
                (folder / name).mkdir()
            files = [f"{name}/{frame}.png" for frame in range(one.frames)] if is_video else [name]
            for file in files:
                size = one.size if is_video else one
                (folder / file).write_bytes(native_image(rng, size, tile).encoded)
        turns = [
            {"from": "human", "value": f"{asked}what is it"},
            {"from": "gpt", "value": f"answer {line}"},
        ]
        files = {kind: names for kind, names in media.items() if names}
        records.append(files | {"conversations": turns})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def difference(checkpoint: Path, hf: Path, packs: Path) -> float:
    """Return how far the logits of an export are from those of its checkpoint."""
    from tools.verification.logits import compare

    return compare(str(checkpoint), hf, packs, packs=9).max_abs_difference


@pytest.mark.parametrize(
    "architecture", [SMALL, SMALL_2, SMALL_3, SMALL_3_MOE], ids=["2.5", "2", "3", "experts"]
)
def test_an_export_is_verified_with_its_packs(
    ranks: Pool, tmp_path: Path, architecture: Architecture
) -> None:
    words = tmp_path / "words"
    make_tokenizer(words, IMAGE_TOKEN_SETS["qwen2_vl"].added)
    token = load_tokenizer(words).convert_tokens_to_ids("<|image_pad|>")
    source = make_qwen_vl(
        tmp_path / "hf", architecture, torch.float32, image_token_id=token, spread=0.05
    )
    packs = tmp_path / "packs"
    records = write_records(tmp_path, architecture.vision.image_size)
    video = VideoPixels(least=64, most=2048, total=4096)
    bounds = dict(min_pixels=64, max_pixels=4096, video=video)
    facts = dict(template=kind_of(architecture).template, mode="native", **bounds)
    pack_records(records, words, packs, architecture, **facts)
    reader = Reader(packs)
    table = np.concatenate([reader.read(number).images for number in range(len(reader))])
    assert (table["tiles"] == 0).any() and (table["frames"] == 1).any()
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    [found] = ranks.run(difference, 1, start, out, packs)
    assert 0 <= found <= 1e-4
    # Another export is told apart.
    other = make_qwen_vl(tmp_path / "other", architecture, torch.float32, image_token_id=token)
    started = convert.import_(other, tmp_path / "second", tokenizer=words)
    [found] = ranks.run(difference, 1, started, out, packs)
    assert found > 1e-2
    # Adapters of the vision encoder too, whose queries, keys and values share an A.
    (tmp_path / "adapted").mkdir()
    lora = Lora(rank=4, targets=("language", "vision"))
    adapted = checkpoint_of(source, tmp_path / "adapted" / "start", lora)
    whole = convert.export(adapted, tmp_path / "merged", tokenizer=words)
    [found] = ranks.run(difference, 1, adapted, whole, packs)
    assert 0 <= found <= 1e-4
