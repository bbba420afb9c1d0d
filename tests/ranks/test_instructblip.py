"""InstructBLIP: logits against ``transformers``, packs against their samples alone, its cost
against torch's count, its memory, its training at other layouts, and its resume.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavlm.config.recipes.instructblip import STAGES
from megavlm.config.schema import Architecture, Config, Vision
from megavlm.data.sample import Sample
from megavlm.planner.flops import pieces, training_cost
from tests.convert.blip2_models import INSTRUCT, INSTRUCT_KINDS, make_instructblip
from tests.data.samples import make_dataset, make_sample, write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, asks_for_all
from tests.ranks.model_checks import (
    CONTEXT,
    WORLDS,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve, whole_weights
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_memory import assert_memory_is_held
from tests.ranks.test_resume import make_job, resume_bit_for_bit

MASK = STAGES["1"].training.trainable
LONGEST = 17
# A boundary in the vision encoder is in LAYOUTS; here is one in the language model.
IN_LANGUAGE = {"pipeline_model_parallel_size": 2, "layout": "v*3,c,t|t*2,h"}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    **{str(layout): (layout.ranks, layout.settings) for layout in LAYOUTS if layout.layers == 3},
    "PP2 in the language model": (2, IN_LANGUAGE),
}
EVERYDAY = [
    name
    for name in RUNS
    if asks_for_all()
    or name in ("TP2 SP", "PP2", "CP2", "DP2", "TP2 whole vision layers")
    or name in ("TP2", "PP2 in the language model")
]
_config = partial(recipe_config, "instructblip")
# Three layers each, heads that divide among four ranks, and pixels as in the packs.
PIXELS = {name: getattr(Vision(), name) for name in ("pixel_mean", "pixel_std")}
MODEL = dataclasses.replace(
    INSTRUCT,
    vision=dataclasses.replace(INSTRUCT.vision, num_layers=3, num_attention_heads=4, **PIXELS),
    language=dataclasses.replace(
        INSTRUCT.language, num_layers=3, num_attention_heads=8, num_query_groups=4
    ),
)


def questions(architecture: Architecture, lengths: tuple[int, ...]) -> list[Sample]:
    """Make samples of one image each, with so many tokens of an instruction."""
    rng = np.random.default_rng(1)
    sizes = sizes_of(architecture)
    return [
        make_sample(
            rng,
            images=1,
            text_tokens=length + 4,
            line=number,
            instruction_tokens=length,
            instruction_vocab=architecture.connector.qformer.vocab_size,
            **sizes,
        )
        for number, length in enumerate(lengths, start=1)
    ]


@pytest.mark.parametrize("kind", INSTRUCT_KINDS if asks_for_all() else ("llama", "opt"))
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = INSTRUCT_KINDS[kind]
    packs = tmp_path / "packs"
    samples = questions(architecture, (9, 2, LONGEST))
    sizes = sizes_of(architecture)
    write_packs(packs, [samples], capacity=128, instruction_length=LONGEST, **sizes)
    folder = make_instructblip(tmp_path / "hf", architecture, torch.float32, CONTEXT, spread=0.05)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    worlds = WORLDS if kind == "llama" or asks_for_all() else {"one process": (1, {})}
    assert_equals_transformers(ranks, configure, folder, expected, worlds)


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    samples = questions(INSTRUCT, (12, 5, LONGEST, 2))
    sizes = sizes_of(INSTRUCT) | {"instruction_length": LONGEST}
    assert_pack_equals_samples_alone(
        ranks, partial(_config, INSTRUCT), samples, tmp_path, capacity=160, **sizes
    )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    sizes = sizes_of(MODEL) | {"instruction_length": LONGEST}
    make_dataset(folder, packs=12, capacity=240, alignment=4, image_share=0.8, **sizes)
    return folder


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    language = dataclasses.replace(INSTRUCT.language, vocab_size=256)
    architecture = dataclasses.replace(INSTRUCT, language=language)
    sizes = sizes_of(architecture) | {"instruction_length": LONGEST}
    make_dataset(tmp_path, packs=1, image_share=1.0, **sizes)
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, MASK, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, MASK).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


def test_the_memory_is_what_is_held(ranks: Pool, packs: Path) -> None:
    layout = dict(tensor_model_parallel_size=2, trainable=MASK)
    assert_memory_is_held(ranks, _config(MODEL, packs, **layout), 2)


@pytest.fixture(scope="module")
def alone(ranks: Pool, packs: Path) -> Curve:
    return ranks.run(train_curve, 1, run_of(packs))[0]


def run_of(packs: Path, **settings: Any) -> Config:
    return _config(MODEL, packs, **dict(trainable=MASK, adam_eps=1e-3, steps=3) | settings)


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_layout_trains_like_one_process(
    ranks: Pool, packs: Path, alone: Curve, name: str
) -> None:
    (world, settings) = RUNS[name]
    curves = ranks.run(train_curve, world, run_of(packs, **settings))
    assert max(compare(curves, alone).values()) <= LIMIT


def test_frozen_parts_stay_bit_for_bit_and_all_of_the_q_former_is_trained(
    ranks: Pool, packs: Path, alone: Curve
) -> None:
    fresh = whole_weights(ranks.run(train_curve, 1, run_of(packs, steps=0)))
    after = whole_weights([alone])
    changed = {key for key, weight in after.items() if not np.array_equal(weight, fresh[key])}
    # Nothing reads what the last layer makes of the texts, as in the authors' code: its MLP for
    # them decays.
    unread = {f"connector.layers.2.text_mlp{name}.bias" for name in (".up", ".down", "_norm")}
    assert changed == {key for key in after if key.startswith("connector.")} - unread
    assert {"connector.norm.weight", "connector.token_embedding.weight"} <= changed


def test_other_instructions_give_other_features(ranks: Pool, tmp_path: Path) -> None:
    samples = questions(INSTRUCT, (12, 5))
    others = [
        dataclasses.replace(sample, instruction=sample.instruction % 60 + 1) for sample in samples
    ]
    found = []
    for number, chosen in enumerate((samples, others)):
        sizes = sizes_of(INSTRUCT) | {"instruction_length": LONGEST}
        write_packs(tmp_path / str(number), [chosen] * 4, capacity=160, **sizes)
        [curve] = ranks.run(train_curve, 1, _config(INSTRUCT, tmp_path / str(number), steps=1))
        found.append(curve.losses[0])
    assert abs(found[0] - found[1]) > 1e-6


def test_it_resumes_bit_for_bit(ranks: Pool, packs: Path, tmp_path: Path) -> None:
    def of(folder: Path) -> Config:
        job = make_job(packs, folder, trainable=MASK)
        return dataclasses.replace(job, architecture=MODEL, recipe="instructblip", stage="1")

    resume_bit_for_bit(ranks, 2, of, tmp_path)
