"""Contrastive training gives the same at every layout, in one microbatch or in several."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.schema import (
    Architecture,
    Checkpoint,
    Config,
    Connector,
    Contrastive,
    Data,
    Language,
    Vision,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, config_for, make_packs, train_curve, whole_weights

# A width of embeddings that is no multiple of the hidden size, so that rows are filled up.
CLIP = Architecture(
    objective="contrastive",
    vision=Vision(
        family="clip",
        image_size=16,
        patch_size=4,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        activation="quick_gelu",
        layernorm_epsilon=1e-5,
    ),
    connector=Connector(kind="class_token"),
    language=Language(
        family="clip_text",
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=4,
        vocab_size=199,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        activation="quick_gelu",
    ),
    contrastive=Contrastive(size=20),
)
SIGLIP = dataclasses.replace(
    CLIP,
    vision=dataclasses.replace(CLIP.vision, family="siglip", activation="gelu_tanh"),
    connector=Connector(kind="attention"),
    language=dataclasses.replace(CLIP.language, family="siglip_text", activation="gelu_tanh"),
    contrastive=Contrastive(size=32, loss="sigmoid", text_bias=True),
)
LLAMA = dataclasses.replace(
    CLIP,
    connector=Connector(kind="mean"),
    language=Language(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=199,
    ),
)
# Half of the patches are dropped in training, and none in evaluation.
DROPPED = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, patch_drop=0.5))
EVERYTHING = ("vision", "connector", "language", "objective")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "DP4": (4, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "recompute": "selective"}),
    "PP2": (2, {"pipeline_model_parallel_size": 2, "layout": "v*3,c,t|t*2,h"}),
    "PP2 inside vision": (2, {"pipeline_model_parallel_size": 2, "layout": "v*2|v,c,t*3,h"}),
    "TP2 with copies, DP2": (4, {"tensor_model_parallel_size": 2, "vision": "data"}),
}
ALWAYS = ("DP4", "TP2", "PP2")
MODELS = {"clip": CLIP, "siglip": SIGLIP, "llama": LLAMA, "patch drop": DROPPED}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack pairs, 2 to 4 a pack."""
    folder = tmp_path_factory.mktemp("pairs") / "packs"
    pack_pairs(folder, text_tokens=(4, 16), capacity=40)
    return folder


def pack_pairs(folder: Path, **settings: Any) -> None:
    usual = dict(image_share=1.0, grids=((1, 1),), features_per_tile=0, packs=16)
    make_packs(folder, **usual | settings)


def run(config: Config) -> Curve:
    return train_curve(config)


def config_of(architecture: Architecture, packs: Path, **settings: Any) -> Config:
    # The bias of the keys has no gradient but noise, which AdamW would blow up.
    usual = dict(trainable=EVERYTHING, steps=3, drop_path=0.2, adam_eps=1e-4, lr=1e-3)
    config = config_for(packs, **usual | settings)
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    return dataclasses.replace(config, architecture=architecture, data=data)


def assert_same(one: list[Curve], other: list[Curve]) -> None:
    assert other[0].losses == pytest.approx(one[0].losses, rel=1e-5)
    assert other[0].grad_norms == pytest.approx(one[0].grad_norms, rel=1e-5)
    before = whole_weights(one)
    after = whole_weights(other)
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert after[key] == pytest.approx(weight, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("architecture", [DROPPED, SIGLIP], ids=["patch drop", "siglip"])
def test_every_layout_trains_like_one_process(
    ranks: Pool, pairs: Path, architecture: Architecture
) -> None:
    one = ranks.run(run, 1, config_of(architecture, pairs))
    assert min(one[0].grad_norms) > 0 and {"objective.logit_scale"} < whole_weights(one).keys()
    for name in ALWAYS:
        world, layout = LAYOUTS[name]
        assert_same(one, ranks.run(run, world, config_of(architecture, pairs, **layout)))


@pytest.mark.skipif(os.environ.get("MEGAVLM_MATRIX") != "all", reason="MEGAVLM_MATRIX=all")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("architecture", MODELS.values(), ids=MODELS)
def test_every_model_trains_like_one_process(
    ranks: Pool, pairs: Path, architecture: Architecture, name: str
) -> None:
    one = ranks.run(run, 1, config_of(architecture, pairs))
    world, layout = LAYOUTS[name]
    assert_same(one, ranks.run(run, world, config_of(architecture, pairs, **layout)))


@pytest.mark.parametrize("architecture", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_four_microbatches_are_one_batch(
    ranks: Pool, tmp_path: Path, architecture: Architecture
) -> None:
    words = (4, 12)
    pack_pairs(tmp_path / "four", packs=4, samples_per_pack=4, text_tokens=words, capacity=64)
    pack_pairs(tmp_path / "one", packs=1, samples_per_pack=16, text_tokens=words, capacity=256)
    usual = dict(drop_path=0.0, steps=3)
    four = ranks.run(run, 1, config_of(architecture, tmp_path / "four", **usual))
    whole = config_of(architecture, tmp_path / "one", **usual, global_batch_size=1)
    assert_same(ranks.run(run, 1, whole), four)


def measure_recalls(config: Config) -> tuple[dict[str, float], list]:
    """Return the figures, and the embeddings of each pack where one process has all."""
    import torch

    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.train.retrieval import recalls

    job = dataclasses.replace(build(config), valid=PackedDataset(config.data.train))
    found = recalls(job)
    if job.groups.size > 1:
        return found, []
    with torch.no_grad():
        packs = [job.chunks[0].eval()(job.valid.batch(i, 0)) for i in range(len(job.valid))]
    return found, [pack.numpy() for pack in packs]


@pytest.mark.parametrize("architecture", [DROPPED, SIGLIP], ids=["patch drop", "siglip"])
def test_recalls_equal_a_search_by_brute_force(
    ranks: Pool, pairs: Path, architecture: Architecture
) -> None:
    [(figures, packs)] = ranks.run(measure_recalls, 1, config_of(architecture, pairs))
    images, texts = np.concatenate(packs, axis=1)
    similar = images @ texts.T
    assert len(similar) > 30
    for direction, rows in (("image_to_text", similar), ("text_to_image", similar.T)):
        for cut in (1, 5, 10):
            nearest = np.argsort(-rows, axis=1)[:, :cut]
            expected = np.mean([row in found for row, found in enumerate(nearest)])
            assert figures[f"recall/{direction}_at_{cut}"] == pytest.approx(expected)
    assert len(set(figures.values())) > 2
    for name in ALWAYS:
        world, layout = LAYOUTS[name]
        found = ranks.run(measure_recalls, world, config_of(architecture, pairs, **layout))
        assert [one for one, _ in found if one] == [figures for one, _ in found if one], name
        assert any(one for one, _ in found)


def test_the_scale_stays_below_its_bound(ranks: Pool, pairs: Path) -> None:
    settings = dataclasses.replace(CLIP.contrastive, max_scale=15.0)
    bounded = dataclasses.replace(CLIP, contrastive=settings)
    stages = dict(pipeline_model_parallel_size=2, precision="bfloat16")
    for world, settings in (1, {}), (2, stages):
        curve = ranks.run(run, world, config_of(bounded, pairs, lr=0.5, steps=3, **settings))
        scale = whole_weights(curve)["objective.logit_scale"]
        assert scale <= math.log(15.0) + 1e-6


def problems_of(architecture: Architecture, pairs: Path, **settings: Any) -> list[str]:
    config = config_of(architecture, pairs, **settings)
    return problems(dataclasses.replace(config, checkpoint=Checkpoint(save_interval=0)), 4)


def test_what_pairs_do_not_support_is_refused(pairs: Path) -> None:
    assert not problems_of(CLIP, pairs)
    [one] = problems_of(dataclasses.replace(CLIP, connector=Connector()), pairs)
    assert "takes one embedding; use class_token, mean, attention or mean_query" in one
    [one] = problems_of(dataclasses.replace(SIGLIP, connector=CLIP.connector), pairs)
    assert "has no class token" in one
    [one] = problems_of(dataclasses.replace(CLIP, connector=SIGLIP.connector), pairs)
    assert "--architecture.contrastive.size is 20; make them equal" in one
    language = dataclasses.replace(CLIP.language, activation="swiglu")
    [one] = problems_of(dataclasses.replace(CLIP, language=language), pairs)
    assert "--architecture.language.activation swiglu" in one
    found = problems_of(CLIP, pairs, tensor_model_parallel_size=2, sequence_parallel=True)
    assert ["sequence_parallel true" in line for line in found] == [True]
    text_model = dataclasses.replace(CLIP, objective="next_token", connector=Connector())
    assert any("has no head over the vocabulary" in line for line in problems_of(text_model, pairs))
