"""LoRA adapters beside experts at every layout, across checkpoints, and merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavlm.config.lora import Lora, is_adapter
from megavlm.config.schema import Config
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, assert_same_part_norms, train_curve, whole_weights
from tests.ranks.test_experts import LAYOUTS, LIMIT, MODEL, Layout, compare, expert_config
from tests.ranks.test_experts import dataset as dataset
from tests.ranks.test_lora import Held, logits_of, logits_with_and_without
from tests.ranks.test_resume import LAST, forget_the_end, losses, make_job, run_job, saved_tensors

ADAPTED = dataclasses.replace(MODEL, lora=Lora(rank=2, targets=("language.*.experts",)))
# The adapters of the experts train, and nothing else of the language model.
SETTINGS = dict(trainable=("connector", "language.*.lora"), steps=4)
EVERYDAY = [
    Layout(expert=2, context=2),
    Layout(expert=2, tensor=2, pipeline=2, data=2, other=(("recompute", "full"),)),
]

WIDE = [layout for layout in LAYOUTS if layout.shared == 1]


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Curve:
    """Train in one process."""
    return ranks.run(train_curve, 1, expert_config(dataset, ADAPTED, **SETTINGS))[0]


@pytest.mark.parametrize("layout", WIDE if asks_for_all() else EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Curve, layout: Layout
) -> None:
    config = expert_config(dataset, ADAPTED, **SETTINGS, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    found = compare(curves, alone)
    assert max(found.values()) <= LIMIT, found
    assert set(alone.part_norms["grad_norm"]) == {"adapters", "connector"}
    assert_same_part_norms(curves, alone)


def test_every_expert_has_adapters_that_learn_and_keeps_its_weights(
    ranks: Pool, dataset: Path, alone: Curve
) -> None:
    still = expert_config(dataset, ADAPTED, **SETTINGS | dict(steps=1, lr=1e-30))
    before = whole_weights(ranks.run(train_curve, 1, still))
    after = whole_weights([alone])
    adapters = [key for key in after if is_adapter(key)]
    assert len(adapters) == 2 * 8 * 2 * 2 and all(".mlp.experts." in key for key in adapters)
    for key, weight in after.items():
        is_trained = is_adapter(key) or key.startswith("connector.")
        assert np.array_equal(weight, before[key]) != is_trained, key


def test_adapters_are_those_of_the_merged_experts(ranks: Pool, dataset: Path) -> None:
    from megavlm.convert.weights.adapters import MergedAdapters

    # One expert of a layer has none.
    model = dataclasses.replace(
        MODEL, lora=Lora(rank=2, targets=("*.layers.0.mlp.experts", "*.layers.1.mlp.experts.[1-7]"))
    )
    config = expert_config(dataset, model, **SETTINGS)
    [(wanted, weights)] = ranks.run(logits_with_and_without, 1, config)
    merged = MergedAdapters(Held(weights), model)
    plain = expert_config(dataset, trainable=("connector",))
    [found] = ranks.run(logits_of, 1, (plain, {key: merged[key] for key in merged.headers}))
    [base] = ranks.run(logits_of, 1, (plain, weights))
    assert (found - wanted).abs().max() < 1e-5 < 1e-3 < (base - wanted).abs().max()


def test_experts_stay_whole_if_a_pattern_keeps_other_layers_in_4_bits(
    ranks: Pool, dataset: Path
) -> None:
    lora = Lora(rank=2, targets=("language.*.self_attention",), nf4=("*.layers.*.mlp.linear_fc1",))
    model = dataclasses.replace(MODEL, lora=lora)
    config = expert_config(dataset, model, **SETTINGS | dict(steps=1))
    [keys] = ranks.run(keys_in_4_bits, 1, config)
    assert keys == {f"vision.encoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(2)}


def keys_in_4_bits(config: Config) -> set[str]:
    """Build a run, and return the keys of its weights in 4 bits."""
    from megavlm.model import nf4_layers
    from tests.ranks.runs import build

    return {key for chunk in build(config).chunks for key, _ in nf4_layers.layers(chunk)}


def job_of(dataset: Path, save: Path, base: Path | None = None, **settings: Any) -> Config:
    usual = dict(global_batch_size=4, drop_path=0.0, adam_eps=1e-3)
    job = make_job(dataset, save, *([base] if base else []), **usual | settings)
    model = ADAPTED if base else MODEL
    return dataclasses.replace(job, architecture=model)


def test_a_run_starts_from_experts_without_adapters_and_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    ranks.run(run_job, 1, job_of(dataset, base, stage="1", trainable=("connector",)))
    mask = SETTINGS["trainable"]
    layout = Layout(expert=2, data=2)
    job = job_of(dataset, tmp_path / "whole", base, trainable=mask, **layout.settings)
    ranks.run(run_job, layout.ranks, job)
    [start], [whole] = (
        ranks.run(saved_tensors, 1, tmp_path / name / LAST) for name in ("base", "whole")
    )
    frozen = [key for key in start if key.startswith("model.language.")]
    assert frozen and all(torch.equal(start[key], whole[key]) for key in frozen)
    moments = [key for key in whole if key.startswith("optimizer.state.exp_avg.")]
    assert sum(".experts.7.linear_fc2.lora." in key for key in moments) == 2 * 2
    for other in (layout, Layout(tensor=2)):
        resumed = tmp_path / str(other.ranks * other.tensor)
        forget_the_end(tmp_path / "whole", resumed)
        job = job_of(dataset, resumed, base, trainable=mask, **other.settings)
        ranks.run(run_job, other.ranks, job)
        [found] = ranks.run(saved_tensors, 1, resumed / LAST)
        assert found.keys() == whole.keys()
        if other is layout:
            assert losses(resumed) == losses(tmp_path / "whole")[3:]
            assert all(torch.equal(found[key], whole[key]) for key in whole)
        assert losses(resumed) == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
