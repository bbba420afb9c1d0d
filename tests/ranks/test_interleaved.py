"""Pipelines whose ranks hold several chunks each: what is loaded, what travels, and what a number
of packs that does not fit changes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY, config_for, make_packs, train_curve
from tests.ranks.test_pipeline import PACKS, messages
from tests.ranks.test_resume import forget_the_end, losses, make_job, run_job

INTERLEAVED = dict(
    pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, layout="v*2|v|c,t*2|t,h"
)
DEEP = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=5),
    language=dataclasses.replace(TINY.language, num_layers=4),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=7, image_share=0.6, alignment=4)
    return folder


@pytest.mark.parametrize(
    ("trainable", "first_trained"),
    [
        (EVERYTHING, 0),
        (("vision.encoder.layers.2",), 1),
        (("connector",), 2),
        (("language.output_layer",), 3),
    ],
)
def test_only_what_is_needed_travels_between_chunks(
    ranks: Pool, dataset: Path, trainable: tuple[str, ...], first_trained: int
) -> None:
    answers = ranks.run(messages, 2, config_for(dataset, trainable=trainable, **INTERLEAVED))
    tiles = [(TINY.vision.tokens, count, TINY.vision.hidden_size) for count in answers[0][2]]
    tokens = [(128, 1, TINY.language.hidden_size)] * PACKS
    sent: list[list] = [[], []]
    for border, shapes in enumerate((tiles, tiles, tokens)):
        sent[border % 2] += shapes
        sent[(border + 1) % 2] += shapes if first_trained <= border else []
    for rank in range(2):
        assert sorted(answers[rank][0]) == sorted(answers[1 - rank][1]) == sorted(sent[rank])


def test_a_pack_goes_to_the_device_once(ranks: Pool, dataset: Path) -> None:
    answers = ranks.run(messages, 2, config_for(dataset, trainable=("connector",), **INTERLEAVED))
    assert [moved for *_, moved in answers] == [PACKS, PACKS]


@pytest.mark.parametrize("pack_count", [1, 5])
def test_a_held_out_loss_does_not_depend_on_how_many_packs_fit(
    ranks: Pool, dataset: Path, tmp_path: Path, pack_count: int
) -> None:
    found = []
    for name, world, layout in (("alone", 1, {}), ("interleaved", 2, INTERLEAVED)):
        config = make_job(dataset, tmp_path / name, **layout)
        training = dataclasses.replace(config.training, steps=1, eval_packs=pack_count)
        config = dataclasses.replace(
            config, training=training, data=dataclasses.replace(config.data, valid=str(dataset))
        )
        ranks.run(run_job, world, config)
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        found.append([line["valid_loss"] for line in lines if "valid_loss" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 2


def test_eight_chunks_on_four_ranks_train_like_one_process(ranks: Pool, dataset: Path) -> None:
    layout = dict(
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        layout="v|v|v|v|v,c,t|t|t|t,h",
    )
    alone, split = (
        ranks.run(
            train_curve,
            world,
            dataclasses.replace(config_for(dataset, steps=3, **settings), architecture=DEEP),
        )[0]
        for world, settings in ((1, {}), (4, layout))
    )
    assert split.losses == pytest.approx(alone.losses, rel=1e-5)
    assert split.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)


@pytest.mark.parametrize(
    "layout", [INTERLEAVED, dict(pipeline_model_parallel_size=2, layout="v*3,t|t*2")]
)
def test_frozen_layers_that_would_be_recomputed_may_stand_before_all_that_is_trained(
    ranks: Pool, dataset: Path, layout: dict
) -> None:
    mask = ("language.output_layer",)
    [alone] = ranks.run(train_curve, 1, config_for(dataset, trainable=mask, steps=3))
    split = ranks.run(
        train_curve, 2, config_for(dataset, trainable=mask, steps=3, recompute="full", **layout)
    )[0]
    assert split.losses == pytest.approx(alone.losses, rel=1e-5)
    assert split.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(ranks: Pool, dataset: Path, recompute: str) -> None:
    kept, again = (
        ranks.run(
            train_curve, 2, config_for(dataset, steps=3, drop_path=0.2, **INTERLEAVED, **settings)
        )[0]
        for settings in ({}, dict(recompute=recompute))
    )
    assert np.allclose(kept.losses, again.losses, rtol=1e-6) and np.allclose(
        kept.grad_norms, again.grad_norms, rtol=1e-6
    )


def test_a_checkpoint_of_many_chunks_goes_on_at_other_layouts(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "whole", **INTERLEAVED))
    even = dict(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3, layout="even"
    )
    tensor = dict(tensor_model_parallel_size=2)
    layouts = [(2, even), (4, INTERLEAVED | tensor)]
    for world, layout in layouts + ([(1, {}), (2, tensor)] if asks_for_all() else []):
        save = tmp_path / f"other-{len(list(tmp_path.iterdir()))}"
        forget_the_end(tmp_path / "whole", save)
        ranks.run(run_job, world, make_job(dataset, save, **layout))
        assert losses(save) == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
