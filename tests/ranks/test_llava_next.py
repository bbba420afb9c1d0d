"""LLaVA-NeXT against ``transformers``, its packs against their samples alone, its cost against
torch's count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.config.lora import Lora
from megavlm.config.recipes.llava_next import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import convert, preprocessing
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.manifest import read_manifest
from megavlm.planner.flops import pieces, training_cost
from tests.convert.hf.test_peft import checkpoint_of
from tests.convert.llava_next_models import (
    KINDS,
    LINEAR,
    SIZES,
    SMALL,
    make_anyres_packs,
    make_anyres_sample,
    make_llava_next,
    write_anyres,
)
from tests.convert.round_trip import golden_words
from tests.data.samples import make_dataset
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    WORLDS,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    pack_records,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_resume import STEPS, forget_the_end, make_job, resume_bit_for_bit, run_job
from tests.ranks.test_whole_way import write_records

TRAINABLE = STAGES["2"].training.trainable
CAPACITY = 288
EVERYDAY = {
    "mlp": ("TP2 PP2 SP", "TP2 CP2 whole vision layers"),
    "linear": ("TP2 whole vision layers",),
}
EVERYDAY_KINDS = ("vicuna", "mistral, linear")


_config = partial(recipe_config, "llava_next", trainable=TRAINABLE)


def model_of(connector: str, layers: int = 2) -> Architecture:
    """Return a model whose heads four ranks can share."""
    heads = dict(num_layers=layers, num_attention_heads=4)
    return dataclasses.replace(
        SMALL,
        connector={"mlp": SMALL.connector, "linear": LINEAR}[connector],
        vision=dataclasses.replace(SMALL.vision, **heads),
        language=dataclasses.replace(SMALL.language, **heads, num_query_groups=2),
    )


@pytest.mark.parametrize("kind", KINDS if asks_for_all() else EVERYDAY_KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    facts = sizes_of(architecture)
    rng = np.random.default_rng(1)
    shown = [(size,) for size in SIZES] + [(), SIZES[:2]]
    samples = [
        make_anyres_sample(rng, sizes, text_tokens=9 + place, line=place + 1, **facts)
        for place, sizes in enumerate(shown)
    ]
    write_anyres(packs, [samples], capacity=1024, **facts)
    folder = make_llava_next(tmp_path / "hf", architecture, torch.float32, 7, spread=0.05)
    expected = answers_of_transformers(folder, packs, architecture)
    worlds = WORLDS if kind == "vicuna" or asks_for_all() else {"one process": (1, {})}
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected, worlds)


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    facts = sizes_of(SMALL)
    samples = [
        make_anyres_sample(rng, sizes, text_tokens=12 + 5 * place, line=place + 1, **facts)
        for place, sizes in enumerate(((SIZES[0],), (), SIZES[1:3], (SIZES[4],)))
    ]
    assert_pack_equals_samples_alone(
        ranks,
        partial(_config, SMALL),
        samples,
        tmp_path,
        write=write_anyres,
        capacity=480,
        **facts,
    )


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    architecture = dataclasses.replace(
        SMALL, language=dataclasses.replace(SMALL.language, vocab_size=256)
    )
    make_anyres_packs(tmp_path, 1, CAPACITY, **sizes_of(architecture))
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, TRAINABLE, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, TRAINABLE).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys
    assert "connector.newline" in keys
    batch = PackedDataset(tmp_path).batch(0, 0)
    shown = int((batch.tokens == 7).sum())
    assert 0 < len(batch.newline_positions) == shown - len(batch.feature_numbers)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_anyres_packs(folder, 12, CAPACITY, alignment=4, **sizes_of(SMALL))
    return folder


@pytest.mark.parametrize(
    ("connector", "layout"),
    [
        (connector, layout)
        for connector, everyday in EVERYDAY.items()
        for layout in LAYOUTS
        if asks_for_all() or str(layout) in everyday
    ],
    ids=str,
)
def test_a_layout_trains_like_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    packs: Path,
    connector: str,
    layout: Layout,
) -> None:
    architecture = model_of(connector, max(2, layout.layers))
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs, **settings))
    settings |= layout.settings
    curves = ranks.run(train_curve, layout.ranks, _config(architecture, packs, **settings))
    assert max(compare(curves, expected).values()) <= LIMIT


def test_a_run_that_goes_on_is_the_same_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    # The packs' pixels are normalised as InternVL's.
    mean, std = PIXELS["imagenet"]
    architecture = model_of("mlp")
    vision = dataclasses.replace(architecture.vision, pixel_mean=mean, pixel_std=std)
    packs = tmp_path / "packs"
    make_anyres_packs(packs, 12, CAPACITY, alignment=4, **sizes_of(SMALL))

    def job(save: Path) -> Config:
        layout = dict(tensor_model_parallel_size=2, vision="data")
        made = make_job(packs, save, trainable=TRAINABLE, **layout)
        model = dataclasses.replace(architecture, vision=vision)
        return dataclasses.replace(made, architecture=model, recipe="llava_next", stage="2")

    whole = resume_bit_for_bit(ranks, 2, job, tmp_path)
    assert whole["model.connector.newline"].shape == (SMALL.language.hidden_size,)


def test_a_run_on_texts_alone_keeps_how_images_become_tiles(ranks: Pool, tmp_path: Path) -> None:
    mean, std = PIXELS["imagenet"]
    vision = dataclasses.replace(SMALL.vision, pixel_mean=mean, pixel_std=std)
    architecture = dataclasses.replace(SMALL, vision=vision)
    packs = tmp_path / "packs"
    make_dataset(packs, packs=12, image_share=0.0)
    grids = ((3, 2), (1, 2))
    model = make_llava_next(tmp_path / "hf", architecture, torch.float32, grids=grids)
    made = make_job(packs, tmp_path / "run", model, trainable=("language",))
    config = dataclasses.replace(made, architecture=architecture, recipe="llava_next", stage="2")
    ranks.run(run_job, 1, config)
    forget_the_end(tmp_path / "run", tmp_path / "again")
    files = dataclasses.replace(config.checkpoint, save=str(tmp_path / "again"))
    ranks.run(run_job, 1, dataclasses.replace(config, checkpoint=files))
    for save in ("run", "again"):  # the second one was resumed
        found = preprocessing.of_checkpoint(tmp_path / save / f"step_{STEPS:08d}")
        assert (found.tiling, found.grids, found.is_trained) == ("anyres", grids, True)
        assert found.template == read_manifest(packs).template


def difference(checkpoint: Path, hf: Path, packs: Path) -> float:
    """Return how far the logits of an export are from those of its checkpoint."""
    from tools.verification.logits import compare

    return compare(str(checkpoint), hf, packs, packs=1).max_abs_difference


def test_an_export_is_verified_with_packs_of_its_tiles(ranks: Pool, tmp_path: Path) -> None:
    words = tmp_path / "words"
    golden_words(words, "llava")
    source = make_llava_next(tmp_path / "hf", SMALL, torch.float32, spread=0.05)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    records = write_records(tmp_path)
    for tiling in ("anyres", "crop"):
        pack_records(records, words, tmp_path / tiling, SMALL, template="llava_v1", mode=tiling)
    [found] = ranks.run(difference, 1, start, out, tmp_path / "anyres")
    assert 0 <= found <= 1e-4
    with pytest.raises(Exception, match="makes a grid of tiles of an image; name packs of"):
        ranks.run(difference, 1, start, out, tmp_path / "crop")
    # Adapters that are merged in float32, and in bfloat16 beside a vision encoder in float32.
    weights = load_file(source / "model.safetensors")
    parts = {
        name: tensor.bfloat16() if name.startswith("language_model") else tensor
        for name, tensor in weights.items()
    }
    save_file(parts, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "adapted").mkdir()
    adapted = checkpoint_of(source, tmp_path / "adapted" / "start", Lora(rank=4))
    for dtype in (torch.float32, None):
        whole = convert.export(adapted, tmp_path / f"{dtype}", dtype=dtype, tokenizer=words)
        [found] = ranks.run(difference, 1, adapted, whole, tmp_path / "anyres")
        assert 0 <= found <= 1e-4
