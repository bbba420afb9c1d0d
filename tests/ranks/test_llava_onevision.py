"""LLaVA-OneVision against ``transformers``, its packs against their samples alone, its cost against
torch's count, and its training at other layouts: what LLaVA-NeXT does not have, which is features
that are mixed of several, samples of several images, and videos.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.config.recipes.llava_onevision import STAGES
from megavlm.config.schema import Config
from megavlm.convert.hf import convert
from megavlm.convert.hf.json_files import read_json
from megavlm.data.images.anyres import ONEVISION_GRIDS
from megavlm.data.loading.dataset import PackedDataset
from megavlm.planner.flops import training_cost
from tests.convert.llava_next_models import (
    LARGE_SIZES,
    ONEVISION,
    SMALL,
    make_anyres_sample,
    make_llava_onevision,
    make_onevision_packs,
    write_anyres,
)
from tests.convert.round_trip import golden_words
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
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
from tests.ranks.test_llava_next import difference
from tests.ranks.test_resume import make_job, resume_bit_for_bit

TRAINABLE = STAGES["2"].training.trainable
MODE = "anyres_max_9"
CAPACITY = 384
EVERYDAY = ("TP2 PP2 SP", "TP2 CP2 whole vision layers")
# Heads that four ranks can share.
_HEADS = dict(num_layers=2, num_attention_heads=4)
MODEL = dataclasses.replace(
    ONEVISION,
    vision=dataclasses.replace(ONEVISION.vision, **_HEADS),
    language=dataclasses.replace(ONEVISION.language, **_HEADS),
)

_config = partial(recipe_config, "llava_onevision", trainable=TRAINABLE)


def test_logits_and_losses_equal_those_of_transformers(ranks: Pool, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    facts = sizes_of(ONEVISION)
    rng = np.random.default_rng(1)
    shown = [(size,) for size in LARGE_SIZES] + [(), LARGE_SIZES[:2], LARGE_SIZES[3:]]
    # Videos: one, with an image, two with images between them, and two of as many frames.
    shown += [((40, 30, 3),), (LARGE_SIZES[5], (20, 33, 2)), ((9, 50, 2), (50, 9, 2))]
    shown += [((18, 18, 1), *LARGE_SIZES[:2], (30, 30, 4))]
    samples = [
        make_anyres_sample(rng, sizes, text_tokens=9 + place, line=place + 1, mode=MODE, **facts)
        for place, sizes in enumerate(shown)
    ]
    write_anyres(packs, [samples], MODE, capacity=1536, **facts)
    folder = make_llava_onevision(tmp_path / "hf", ONEVISION, torch.float32, 7, spread=0.05)
    expected = answers_of_transformers(folder, packs, ONEVISION)
    worlds = {
        "one process": (1, {}),
        "tp2": (2, dict(tensor_model_parallel_size=2)),
    }
    configure = partial(_config, ONEVISION, packs)
    assert_equals_transformers(ranks, configure, folder, expected, worlds)


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    facts = sizes_of(ONEVISION)
    samples = [
        make_anyres_sample(
            rng, sizes, text_tokens=12 + 5 * place, line=place + 1, mode=MODE, **facts
        )
        for place, sizes in enumerate(
            ((LARGE_SIZES[5],), (), LARGE_SIZES[1:3], (LARGE_SIZES[4], (40, 30, 3)))
        )
    ]
    assert_pack_equals_samples_alone(
        ranks,
        partial(_config, ONEVISION),
        samples,
        tmp_path,
        write=partial(write_anyres, mode=MODE),
        capacity=576,
        **facts,
    )


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    language = dataclasses.replace(ONEVISION.language, vocab_size=256)
    architecture = dataclasses.replace(ONEVISION, language=language)
    make_onevision_packs(tmp_path, 1, CAPACITY, **sizes_of(architecture))
    [(counted, size, _)] = ranks.run(counted_by_torch, 1, tmp_path, TRAINABLE, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, TRAINABLE).total(**size) == counted
    batch = PackedDataset(tmp_path).batch(0, 0)
    placed = len(batch.feature_numbers) + len(batch.newline_positions) + len(batch.mixed.positions)
    assert placed == int((batch.tokens == 7).sum()) and len(batch.mixed.positions) > 100


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_onevision_packs(folder, 12, CAPACITY, alignment=4, **sizes_of(MODEL))
    return folder


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if asks_for_all() or str(layout) in EVERYDAY],
    ids=str,
)
def test_a_layout_trains_like_one_process(
    ranks: Pool, train_alone: Callable[[Config], Curve], packs: Path, layout: Layout
) -> None:
    layers = dict(num_layers=max(2, layout.layers))
    architecture = dataclasses.replace(
        MODEL,
        vision=dataclasses.replace(MODEL.vision, **layers),
        language=dataclasses.replace(MODEL.language, **layers),
    )
    settings = dict(adam_eps=1e-3, steps=3)
    expected = train_alone(_config(architecture, packs, **settings))
    settings |= layout.settings
    curves = ranks.run(train_curve, layout.ranks, _config(architecture, packs, **settings))
    assert max(compare(curves, expected).values()) <= LIMIT


def test_a_run_that_goes_on_is_the_same_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    # The packs' pixels are normalised as InternVL's.
    usual = type(MODEL.vision)()
    pixels = dict(pixel_mean=usual.pixel_mean, pixel_std=usual.pixel_std)
    architecture = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, **pixels))
    packs = tmp_path / "packs"
    make_onevision_packs(packs, 12, CAPACITY, alignment=4, **sizes_of(MODEL))

    def job(save: Path) -> Config:
        layout = dict(tensor_model_parallel_size=2, vision="data")
        made = make_job(packs, save, trainable=TRAINABLE, **layout)
        return dataclasses.replace(
            made, architecture=architecture, recipe="llava_onevision", stage="2"
        )

    resume_bit_for_bit(ranks, 2, job, tmp_path)


def test_an_export_is_verified_with_videos(ranks: Pool, tmp_path: Path) -> None:
    words = tmp_path / "words"
    golden_words(words, "llava")
    model = dataclasses.replace(ONEVISION, language=SMALL.language)
    source = make_llava_onevision(tmp_path / "hf", model, torch.float32, spread=0.05)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    # The tokenizer has no token for videos.
    assert read_json(out / "config.json")["video_token_index"] == -1
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (30, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    texts = {
        "<video>\nwhat": {"video": "a"},
        "<video><image>\nwhat": {"video": ["b"], "image": "c.png"},
        "what <video> and <video> or <image>": {"video": ["b", "a"], "image": "c.png"},
    }
    records = [
        media | {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}
        for text, media in texts.items()
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    pack_records(
        tmp_path / "records.jsonl",
        words,
        tmp_path / "packs",
        model,
        template="llava_v1",
        mode=MODE,
        grids=ONEVISION_GRIDS,
    )
    [found] = ranks.run(difference, 1, start, out, tmp_path / "packs")
    assert 0 <= found <= 1e-4
