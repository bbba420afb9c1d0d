"""A run over a blend of two packed datasets with sources of their own: stopped and resumed it
is the run that was not stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megavlm.config.checks.rules import ConfigError
from megavlm.config.schema import Config
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.test_resume import STEPS, forget_the_end, make_job, run_job, saved_tensors
from tests.ranks.test_sources import SIZES

KINDS = {
    "blend": {},
    "shares of batches, curriculum": dict(batch_shares=True, curriculum=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("packs")
    make_dataset(
        parent / "chats",
        packs=7,
        samples_per_pack=4,
        image_share=0,
        seed=1,
        sources=("chats",),
        **SIZES,
    )
    images = dict(image_share=0.7, seed=2, sources=("scans", "charts"), levels=(4, 5))
    make_dataset(parent / "images", packs=9, samples_per_pack=3, **images, **SIZES)
    return [parent / "chats", parent / "images"]


def _job(folders: list[Path], save: Path, kind: str, workers: int = 0) -> Config:
    config = make_job(folders[0], save)
    data = dataclasses.replace(
        config.data,
        train=",".join(map(str, folders)),
        weights=(1.0, 3.0),
        workers=workers,
        **KINDS[kind],
    )
    return dataclasses.replace(
        config, data=data, training=dataclasses.replace(config.training, global_batch_size=4)
    )


def _told(save: Path) -> list[dict[str, float]]:
    """Read the metrics of the steps that follow from the data alone."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if "loss" in record]
    return [
        {
            name: value
            for name, value in record.items()
            if name in ("step", "lr", "grad_norm") or "loss" in name
        }
        for record in kept
    ]


def test_a_run_that_would_take_other_packs_does_not_go_on(
    ranks: Pool, folders: list[Path], tmp_path: Path
) -> None:
    from megavlm.train import inspection

    config = _job(folders, tmp_path / "run", "shares of batches, curriculum")
    ranks.run(
        run_job,
        1,
        dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1)),
    )
    data = config.data
    training = config.training
    others = {
        "--data.weights: 1.0,3.0 in the checkpoint": dict(
            data=dataclasses.replace(data, weights=(1.0, 2.0))
        ),
        "--data.curriculum: true in the checkpoint, false asked for": dict(
            data=dataclasses.replace(data, curriculum=False)
        ),
        "--data.batch_shares: true in the checkpoint": dict(
            data=dataclasses.replace(data, batch_shares=False)
        ),
        "--training.global_batch_size: 4 in the checkpoint, 8 asked for": dict(
            training=dataclasses.replace(training, global_batch_size=8),
            data=dataclasses.replace(data, group=4),
        ),
    }
    swapped = ",".join(map(str, reversed(folders)))
    others["--data.train .*images,.*chats: names the folders in another order than"] = dict(
        data=dataclasses.replace(data, train=swapped)
    )
    others["--data.train .*: has 9 . 9 packs, and the run began with 7 . 9"] = dict(
        data=dataclasses.replace(data, train=",".join([str(folders[1])] * 2))
    )
    for words, changes in others.items():
        with pytest.raises(ConfigError, match=words):
            inspection.inspect(dataclasses.replace(config, **changes), 1)


@pytest.mark.parametrize(("kind", "other"), list(zip(KINDS, (1, 4), strict=True)))
def test_a_blend_goes_on_bit_for_bit_and_in_the_same_order_at_other_numbers_of_ranks(
    ranks: Pool, folders: list[Path], tmp_path: Path, kind: str, other: int
) -> None:
    whole = tmp_path / "whole"
    assert ranks.run(run_job, 2, _job(folders, whole, kind)) == [STEPS] * 2
    told = _told(whole)
    assert {name for record in told for name in record if name.startswith("loss/")} == {
        "loss/chats/chats",
        "loss/images/scans",
        "loss/images/charts",
    }
    # Each step has one pack of the chats, of which all losses are known by its source, wherever
    # every batch has its share.
    assert kind == "blend" or all("loss/chats/chats" in record for record in told)
    last = f"step_{STEPS:08d}"
    for world in (2, other):
        killed = tmp_path / f"killed-{world}"
        forget_the_end(whole, killed)
        # Loader workers change nothing, and take seconds to start.
        workers = int(kind == "blend" and world == 1)
        ranks.run(run_job, world, _job(folders, killed, kind, workers))
        found = _told(killed)
        if world == 2:
            assert found == told[3:]
            [expected], [mine] = (
                ranks.run(saved_tensors, 1, save / last) for save in (whole, killed)
            )
            assert mine.keys() == expected.keys() and all(
                torch.equal(mine[key], expected[key]) for key in expected
            )
        assert len(found) == STEPS - 3
        assert all(
            mine == pytest.approx(expected, rel=1e-4, abs=1e-9)
            for mine, expected in zip(found, told[3:], strict=True)
        )
