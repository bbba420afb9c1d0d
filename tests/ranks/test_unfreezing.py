"""Parameters that are unfrozen inside a run: frozen until then, fresh moments from then on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import BadSteps, Config
from megavlm.job_checks import parameter_problems
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs, train_curve, whole_weights
from tests.ranks.test_resume import losses, make_job, resume_bit_for_bit, run_job

UNTIL = ("vision=2", "language.decoder.layers.1=4")
SETTINGS = dict(frozen_until=UNTIL, lr=1e-2, warmup_ratio=0.0, schedule="constant", adam_eps=1e-12)
EVERYWHERE = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="v*2|v,t*3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8, alignment=4)
    return folder


def test_what_is_frozen_stays_and_then_begins_anew(ranks: Pool, dataset: Path) -> None:
    plain = SETTINGS | dict(weight_decay=0.0, adam_eps=1e-30)
    by_steps = [
        whole_weights(ranks.run(train_curve, 1, config_for(dataset, steps=steps, **plain)))
        for steps in (4, 5)
    ]
    start = whole_weights(ranks.run(train_curve, 1, config_for(dataset, steps=5, lr=1e-60)))
    for key in start:
        waits = key.startswith("language.decoder.layers.1.")
        changed = [not np.array_equal(weights[key], start[key]) for weights in by_steps]
        assert changed == ([False, True] if waits else [True, True]), key
        if waits:
            # The first update of AdamW is as large as the rate, whatever the gradient.
            update = np.abs(by_steps[1][key] - start[key])
            assert np.median(update[update > 0]) == pytest.approx(1e-2, rel=1e-4), key


def test_every_layout_unfreezes_alike(ranks: Pool, dataset: Path) -> None:
    settings = SETTINGS | dict(steps=6, adam_eps=1e-4)
    [alone] = ranks.run(train_curve, 1, config_for(dataset, **settings))
    shared = ranks.run(train_curve, 8, config_for(dataset, **settings, **EVERYWHERE))
    assert shared[0].losses == pytest.approx(alone.losses, rel=1e-5)
    assert shared[0].grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
    other = config_for(dataset, **settings | dict(frozen_until=UNTIL[:1]))
    [early] = ranks.run(train_curve, 1, other)
    assert early.losses[:3] != alone.losses[:3] and early.grad_norms[0] > alone.grad_norms[0]


def test_a_run_resumes_bit_for_bit_before_and_after_the_step(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    def job(save: Path) -> Config:
        config = make_job(dataset, save, **SETTINGS)
        return dataclasses.replace(config, bad_steps=BadSteps(skip=True, spike_factor=50))

    resume_bit_for_bit(ranks, 2, job, tmp_path)


def test_drop_path_waits_for_the_vision_encoder_however_it_is_named(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    found = []
    for number, entries in enumerate((("vision=2",), ("vision.*=2",), ("vision=1", "visi*=2"))):
        settings = SETTINGS | dict(frozen_until=entries, steps=3, drop_path=0.5)
        ranks.run(run_job, 1, make_job(dataset, tmp_path / str(number), **settings))
        found.append(losses(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]


def test_a_group_counts_its_own_updates_past_skipped_steps() -> None:
    from megavlm.train.optimizer import set_rates

    groups = [dict(wd_mult=1.0), dict(wd_mult=1.0, lr_mult=3.0, frozen_steps=4)]
    optimizer = type("Optimizer", (), {"param_groups": groups})()
    config = config_for(Path(), steps=10, **SETTINGS)
    beta1 = config.optimizer.adam_beta1
    beta2 = config.optimizer.adam_beta2
    # Steps 2 and 6 were skipped: in step 8 the late group has its third update, the other the 6th.
    set_rates(optimizer, config, step=7, skipped=2, skipped_steps=(2, 6))
    early, late = groups
    assert not early["is_frozen"] and not late["is_frozen"] and early["lr"] == 1e-2
    ratio = (1 - beta1**6) / (1 - beta1**3) * ((1 - beta2**3) / (1 - beta2**6)) ** 0.5
    assert late["lr"] == pytest.approx(1e-2 * ratio, rel=1e-12)
    smaller = ((1 - beta2**3) / (1 - beta2**6)) ** 0.5
    assert late["eps"] / early["eps"] == pytest.approx(smaller, rel=1e-12)
    shrunk = early["lr"] * early["weight_decay"]
    assert late["lr"] * late["weight_decay"] == pytest.approx(shrunk, rel=1e-12) and shrunk > 0
    set_rates(optimizer, config, step=3, skipped=1, skipped_steps=(2,))
    assert late["is_frozen"] and late["lr"] == 0.0 and early["lr"] == 1e-2


def test_settings_that_cannot_be_are_refused(dataset: Path) -> None:
    def told(*entries: str, **settings: object) -> str:
        config = config_for(dataset, steps=10, frozen_until=entries, **settings)
        return json.dumps(parameter_problems(config))

    assert "must be a part or a pattern of names, =, and steps" in told("vision")
    assert "must be from 1 to 9, since the run has 10 steps" in told("vision=10")
    assert "names nothing that --training.trainable trains" in told(
        "vision=3", trainable=("connector",)
    )
    assert "nothing would be trained in the first 3 steps" in told("*=3")
    assert told("vision=3") == "[]"
