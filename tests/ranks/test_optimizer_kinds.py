"""Adam, SGD and Muon at every layout and across checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.checks.rules import ConfigError
from megavlm.config.schema import Config
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, config_for, make_packs, train_curve, whole_weights
from tests.ranks.test_parameter_groups import GROUPS
from tests.ranks.test_resume import forget_the_end, losses, make_job, resume_bit_for_bit, run_job

TENSOR = dict(tensor_model_parallel_size=2)
PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
SETTINGS = GROUPS | dict(steps=3, adam_eps=1e-4, weight_decay=0.5, lr=1e-2)
KINDS = {
    "adam": dict(kind="adam"),
    "sgd": dict(kind="sgd", lr=0.3, adam_eps=1e-8, weight_decay=1e-2, sgd_nesterov=True),
    "muon": dict(kind="muon"),
}
# Three heads do not divide by two.
ODD_HEADS = dict(hidden_size=36, num_attention_heads=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=12, image_share=0.8, alignment=4)
    return folder


def configured(dataset: Path, kind: str, **settings: object) -> Config:
    config = config_for(dataset, **SETTINGS | KINDS[kind] | settings)
    vision = dataclasses.replace(TINY.vision, **ODD_HEADS)
    architecture = dataclasses.replace(config.architecture, vision=vision)
    return dataclasses.replace(config, architecture=architecture)


ALL = [
    (kind, world, layout)
    for kind in KINDS
    for world, layout in (
        (3, dict(global_batch_size=3)),
        (2, TENSOR | dict(sequence_parallel=True, vision="data")),
        (2, dict(context_parallel_size=2)),
        (4, TENSOR | PIPELINE),
        (8, TENSOR | PIPELINE),
    )
]
USUAL = [
    ("sgd", 2, TENSOR),
    ("adam", 2, dict()),
    ("muon", 3, dict(global_batch_size=3)),
    ("muon", 4, TENSOR),
    ("muon", 2, PIPELINE),
]


@pytest.mark.parametrize(("kind", "world", "layout"), USUAL + (ALL if asks_for_all() else []))
def test_updates_are_those_of_one_process(
    ranks: Pool,
    train_alone: Callable[[Config], Curve],
    dataset: Path,
    kind: str,
    world: int,
    layout: dict,
) -> None:
    size = layout.get("global_batch_size", 4)
    alone = train_alone(configured(dataset, kind, global_batch_size=size))
    shared = ranks.run(train_curve, world, configured(dataset, kind, **layout))
    assert_equal(shared, [alone])


def test_muon_updates_a_query_group_that_ranks_share(ranks: Pool, dataset: Path) -> None:
    def run(**layout: object) -> Config:
        config = configured(dataset, "muon", **layout)
        language = dataclasses.replace(config.architecture.language, num_query_groups=1)
        architecture = dataclasses.replace(config.architecture, language=language)
        return dataclasses.replace(config, architecture=architecture)

    assert_equal(ranks.run(train_curve, 2, run(**TENSOR)), ranks.run(train_curve, 1, run()))


def assert_equal(shared: list, alone: list) -> None:
    """Compare the curves and weights of ranks with those of one process."""
    assert shared[0].losses == pytest.approx(alone[0].losses, rel=1e-5)
    assert shared[0].grad_norms == pytest.approx(alone[0].grad_norms, rel=1e-5)
    found = whole_weights(shared)
    for key, weight in whole_weights(alone).items():
        place = tuple(slice(0, size) for size in weight.shape)
        np.testing.assert_allclose(found[key][place], weight, 1e-5, 2e-6, err_msg=key)


def test_the_first_update_of_a_matrix_by_muon_has_the_size_of_its_rate(
    ranks: Pool, dataset: Path
) -> None:
    settings = dict(steps=1, warmup_ratio=0.0, weight_decay=0.0)
    [before] = ranks.run(train_curve, 1, configured(dataset, "muon", **settings | dict(lr=1e-20)))
    after = whole_weights(
        ranks.run(train_curve, 2, configured(dataset, "muon", **settings, **TENSOR))
    )
    for key, start in whole_weights([before]).items():
        change = after[key][tuple(slice(0, size) for size in start.shape)] - start
        size = float(np.sqrt(np.square(change).mean()))
        if ".layers." in key and key.endswith("_fc2.weight") and "vision" not in key:
            # Root mean square 0.2 times the rate, for full rank: *.linear_fc1 has another one.
            factor = 0.9 ** (3 - int(key.split(".")[3]))
            assert 0.7 < size / (0.2 * 1e-2 * factor) < 1.2, (key, size)


@pytest.mark.parametrize("kind", KINDS if asks_for_all() else ["muon"])
def test_a_run_resumes_bit_for_bit_and_at_another_layout(
    ranks: Pool, dataset: Path, tmp_path: Path, kind: str
) -> None:
    settings = GROUPS | KINDS[kind]
    whole = resume_bit_for_bit(
        ranks,
        4,
        lambda save: make_job(dataset, save, **settings, **TENSOR, **PIPELINE),
        tmp_path,
    )
    second = [value for key, value in whole.items() if ".exp_avg_sq." in key and "_fc2.w" in key]
    assert second and all(bool(value.any()) == (kind == "adam") for value in second)
    forget_the_end(tmp_path / "whole", tmp_path / "wide")
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "wide", **settings))
    assert losses(tmp_path / "wide") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)


def test_a_stage_keeps_the_moments_of_the_same_kind_alone(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    from megavlm.train.inspection import inspect

    ranks.run(run_job, 1, make_job(dataset, tmp_path / "run", kind="muon"))
    told = r"optimizer\.kind: muon in the checkpoint, sgd asked for"
    with pytest.raises(ValueError, match=told):
        inspect(make_job(dataset, tmp_path / "run", kind="sgd"), 1)

    def later(name: str, kind: str, moments: str, **layout: object) -> Config:
        settings = dict(stage="1", kind=kind, trainable=("connector", "language"), **layout)
        job = make_job(dataset, tmp_path / name, tmp_path / "run", **settings)
        return dataclasses.replace(
            job, checkpoint=dataclasses.replace(job.checkpoint, moments=moments)
        )

    with pytest.raises(ConfigError, match="the moments of --optimizer.kind muon, and the run has"):
        inspect(later("other", "adamw", "keep"), 1)
    ranks.run(run_job, 1, later("kept", "muon", "keep"))
    ranks.run(run_job, 2, later("kept_2", "muon", "keep", **TENSOR))
    ranks.run(run_job, 1, later("fresh", "muon", "fresh"))
    kept, kept_2, fresh = (losses(tmp_path / name) for name in ("kept", "kept_2", "fresh"))
    assert kept_2 == pytest.approx(kept, rel=1e-5)
    assert kept[0] == fresh[0] and kept != pytest.approx(fresh, rel=1e-4)
