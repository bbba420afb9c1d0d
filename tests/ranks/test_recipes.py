"""Every recipe in bfloat16, the default of ``--training.precision``, with what is recomputed, and
with options drawn at random; other tests compare float32, and options that were thought of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Architecture, Config
from tests.convert.blip2_models import OPT
from tests.convert.fuyu_models import SMALL as FUYU
from tests.convert.llava_models import SMALL as LLAVA
from tests.convert.llava_next_models import ONEVISION, make_anyres_packs, make_onevision_packs
from tests.convert.llava_next_models import SMALL as LLAVA_NEXT
from tests.convert.paligemma_models import PALIGEMMA2
from tests.convert.paligemma_models import SMALL as PALIGEMMA
from tests.convert.qwen_vl_models import SMALL as QWEN2_5_VL
from tests.convert.qwen_vl_models import SMALL_2 as QWEN2_VL
from tests.data.native_packs import write_native
from tests.data.preference_packs import make_preferences, make_reference
from tests.data.samples import make_dataset, write_packs
from tests.ranks import test_contrastive as contrastive
from tests.ranks import test_gpt_oss as gpt_oss
from tests.ranks import test_qformer_objective as qformer
from tests.ranks.model_checks import END, recipe_config, sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, train_curve
from tests.ranks.test_flamingo import OPEN as FLAMINGO
from tests.ranks.test_flamingo import documents
from tests.ranks.test_instructblip import LONGEST
from tests.ranks.test_instructblip import MODEL as INSTRUCTBLIP
from tests.ranks.test_internvl_c import SMALL as INTERNVL_C
from tests.ranks.test_qwen_vl import DEEP as QWEN3_VL

STEPS = dict(steps=3, drop_path=0.0)  # the first one's learning rate is 0
PARTS = ("vision", "connector", "language")


def _of_samples(recipe: str, model: Architecture, folder: Path, **settings: Any) -> Config:
    """Configure a run on random samples."""
    length = LONGEST if model.connector.instruction_tokens else 0
    sizes = sizes_of(model) | {"instruction_length": length}
    make_dataset(folder, packs=4, capacity=240, alignment=4, **sizes)
    trainable = PARTS if model.vision.exists else PARTS[1:]
    return recipe_config(recipe, model, folder, trainable=trainable, **settings)


def _of_grids(
    recipe: str, model: Architecture, make: Callable[..., Any], folder: Path, **settings: Any
) -> Config:
    """Configure a run on images of several tiles."""
    make(folder, 4, 384, alignment=4, **sizes_of(model))
    return recipe_config(recipe, model, folder, trainable=PARTS, **settings)


def _of_whole_images(recipe: str, model: Architecture, folder: Path, **settings: Any) -> Config:
    """Configure a run on images of any size."""
    facts = dict(vocab_size=model.language.vocab_size, tile_size=model.vision.image_size)
    shown = [((32, 32),), ((40, 24), (25, 57)), ()] * 4
    write_native(folder, shown, per_pack=3, alignment=4, context_token_id=7, **facts)
    return recipe_config(recipe, model, folder, trainable=PARTS, **settings)


def _of_documents(folder: Path, **settings: Any) -> Config:
    """Configure a run of Flamingo on documents with images in them."""
    packs = [documents(FLAMINGO, (1, 0, 2), seed) for seed in range(4)]
    write_packs(folder, packs, capacity=128, end_token_id=END, **sizes_of(FLAMINGO))
    return recipe_config("flamingo", FLAMINGO, folder, trainable=PARTS, **settings)


def _of_pairs(model: Architecture, folder: Path, **settings: Any) -> Config:
    """Configure a run on pairs."""
    contrastive.pack_pairs(folder, text_tokens=(4, 16), capacity=40)
    config = contrastive.config_of(model, folder, **settings)
    trainable = (*PARTS, "objective") if model is INTERNVL_C else config.training.trainable
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, trainable=trainable)
    )


def _of_queries(folder: Path, **settings: Any) -> Config:
    """Configure a run of BLIP-2's first stage."""
    contrastive.pack_pairs(folder, text_tokens=(4, 16), capacity=40)
    return qformer.config_of(folder, **settings)


def _of_experts(folder: Path, **settings: Any) -> Config:
    """Configure a run of a GPT-OSS behind InternVL's connector."""
    make_dataset(folder, packs=4, capacity=128, alignment=8, **sizes_of(gpt_oss.MODEL))
    return gpt_oss.configure(folder, **settings)


def _of_preferences(folder: Path, **settings: Any) -> Config:
    """Configure a run of InternVL on preferences."""
    make_preferences(folder, packs=4, alignment=4)
    make_reference(folder / "reference", folder)
    model = dataclasses.replace(TINY, objective="preference")
    config = recipe_config("internvl", model, folder, trainable=PARTS, **settings)
    data = dataclasses.replace(
        config.data, loss_reduction="sample", reference=str(folder / "reference")
    )
    return dataclasses.replace(config, stage="mpo", data=data)


CASES: dict[str, Callable[..., Config]] = {
    "internvl": partial(_of_samples, "internvl", TINY),
    "internvl, GPT-OSS": _of_experts,
    "internvl, preferences": _of_preferences,
    "llava": partial(_of_samples, "llava", LLAVA),
    "llava_next": partial(_of_grids, "llava_next", LLAVA_NEXT, make_anyres_packs),
    "llava_onevision": partial(_of_grids, "llava_onevision", ONEVISION, make_onevision_packs),
    "paligemma": partial(_of_samples, "paligemma", PALIGEMMA),
    "paligemma, Gemma 2": partial(_of_samples, "paligemma", PALIGEMMA2),
    "qwen2_vl": partial(_of_whole_images, "qwen2_vl", QWEN2_VL),
    "qwen2_5_vl": partial(_of_whole_images, "qwen2_5_vl", QWEN2_5_VL),
    "qwen3_vl": partial(_of_whole_images, "qwen3_vl", QWEN3_VL),
    "fuyu": partial(_of_samples, "fuyu", FUYU),
    "blip2, stage 1": _of_queries,
    "blip2": partial(_of_samples, "blip2", OPT),
    "instructblip": partial(_of_samples, "instructblip", INSTRUCTBLIP),
    "flamingo": _of_documents,
    "clip": partial(_of_pairs, contrastive.CLIP),
    "siglip": partial(_of_pairs, contrastive.SIGLIP),
    "internvl_c": partial(_of_pairs, INTERNVL_C),
}


def test_no_recipe_is_left_out() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(RECIPES)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_and_recomputing_change_rounding_only(
    ranks: Pool, tmp_path: Path, name: str
) -> None:
    config = CASES[name](tmp_path, **STEPS)
    [exact] = ranks.run(train_curve, 1, config)
    training = dataclasses.replace(config.training, precision="bfloat16")
    [half] = ranks.run(train_curve, 1, dataclasses.replace(config, training=training))
    assert half.losses == pytest.approx(exact.losses, rel=1e-2)
    assert half.grad_norms == pytest.approx(exact.grad_norms, rel=5e-2)
    parallel = dataclasses.replace(config.parallel, recompute="selective")
    [again] = ranks.run(train_curve, 1, dataclasses.replace(config, parallel=parallel))
    assert again.losses == pytest.approx(exact.losses, rel=1e-6)
    assert again.grad_norms == pytest.approx(exact.grad_norms, rel=1e-5)
