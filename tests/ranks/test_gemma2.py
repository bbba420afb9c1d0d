"""Gemma 2: sliding windows, soft caps and norms behind branches train at every layout as in one
process, with a prefix-LM (PaliGemma 2) and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.lora import Lora
from megavlm.config.schema import Architecture, Config
from megavlm.config.vision import PIXELS
from tests.convert.models import GEMMA2
from tests.convert.paligemma_models import PALIGEMMA2
from tests.data.samples import make_dataset
from tests.ranks.layouts import LIMIT, MASKS, asks_for_all
from tests.ranks.model_checks import sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, config_for, train_curve
from tests.ranks.test_experts import Layout, assert_trains_alike, trained_alone
from tests.ranks.test_layouts import compare
from tests.ranks.test_resume import LAST, forget_the_end, make_job, run_job, saved_tensors

MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=2),
    language=dataclasses.replace(TINY.language, **GEMMA2, kv_channels=14, num_layers=2),
)
# Heads that two ranks divide, and the pixels of the packs.
PREFIX_LM = dataclasses.replace(
    PALIGEMMA2,
    vision=dataclasses.replace(
        PALIGEMMA2.vision,
        num_attention_heads=4,
        pixel_mean=PIXELS["imagenet"][0],
        pixel_std=PIXELS["imagenet"][1],
    ),
)
LAYOUTS = (
    Layout(context=2, tensor=2, everyday=("2",)),
    Layout(pipeline=2, virtual=2, other=(("recompute", "selective"),), everyday=("2",)),
    Layout(data=2),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(context=2),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(tensor=2, data=2, other=(("recompute", "full"),)),
    Layout(tensor=2, other=(("recompute", "selective"),)),
    Layout(tensor=2, other=(("vision", "data"),)),
    Layout(context=2, tensor=2, pipeline=2),
)
CASES = [
    (layout, mask)
    for layout in LAYOUTS
    for mask in MASKS
    if mask in layout.everyday or asks_for_all()
]


def packs_for(folder: Path, architecture: Architecture) -> Path:
    """Write packs of a model, in which most samples are longer than a window."""
    make_dataset(folder, packs=12, capacity=240, alignment=8, **sizes_of(architecture))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packs_for(tmp_path_factory.mktemp("packs") / "train", MODEL)


def configure(dataset: Path, **settings) -> Config:
    config = config_for(dataset, adam_eps=1e-3, **settings)
    return dataclasses.replace(config, architecture=MODEL)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[str], Curve]:
    return trained_alone(ranks, lambda mask: configure(dataset, trainable=MASKS[mask], steps=3))


@pytest.mark.parametrize(("layout", "mask"), CASES, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Callable[[str], Curve], layout: Layout, mask: str
) -> None:
    config = configure(dataset, trainable=MASKS[mask], steps=3, **layout.settings)
    assert_trains_alike(ranks, layout, config, alone(mask))


@pytest.mark.skipif(not asks_for_all(), reason="asked for by MEGAVLM_MATRIX=all")
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(context=2)])
def test_adapters_train_like_one_process(ranks: Pool, dataset: Path, layout: Layout) -> None:
    model = dataclasses.replace(MODEL, lora=Lora(rank=2, targets=("language",)))
    settings = dict(trainable=("language.*.lora", "connector"), steps=3)
    config = dataclasses.replace(configure(dataset, **settings), architecture=model)
    [expected] = ranks.run(train_curve, 1, config)
    config = configure(dataset, **settings, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, dataclasses.replace(config, architecture=model))
    assert max(compare(curves, expected).values()) <= LIMIT


def test_a_run_resumes_bit_for_bit_at_its_layout_and_closely_at_another(
    ranks: Pool, tmp_path: Path
) -> None:
    packs = packs_for(tmp_path / "packs", PREFIX_LM)

    def job(name: str, layout: Layout) -> Config:
        settings = dict(drop_path=0.0, adam_eps=1e-3) | layout.settings
        made = make_job(packs, tmp_path / name, **settings)
        return dataclasses.replace(made, architecture=PREFIX_LM, recipe="paligemma")

    layout = Layout(tensor=2, pipeline=2)
    ranks.run(run_job, 4, job("whole", layout))
    [whole] = ranks.run(saved_tensors, 1, tmp_path / "whole" / LAST)
    norms = [
        key for key in whole if key.endswith(("post_attention_norm.weight", "mlp_norm.weight"))
    ]
    assert len(norms) == 2 * 2 * 4, "of two layers: weight, master weight, both moments"
    for name, other in (("same", layout), ("other", Layout())):
        forget_the_end(tmp_path / "whole", tmp_path / name)
        ranks.run(run_job, other.ranks, job(name, other))
        [found] = ranks.run(saved_tensors, 1, tmp_path / name / LAST)
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            if name == "same":
                assert np.array_equal(tensor, whole[key]), key
            limit = 1e-5 * whole[key].abs().max()
            np.testing.assert_allclose(tensor, whole[key], rtol=1e-4, atol=limit, err_msg=key)
