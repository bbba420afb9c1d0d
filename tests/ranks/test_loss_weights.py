"""Weights of datasets in the loss: gradients are the weighted sum of the datasets' own, and
training is the same at other layouts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.schema import Config, Eval
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.pool import Pool
from tests.ranks.runs import build, config_for
from tests.ranks.test_blend import folders as folders
from tests.ranks.test_resume import losses, make_job, run_job

WEIGHTS = (1.0, 0.2)


def gradients(config: Config, folders: list[Path]) -> list[dict[str, np.ndarray]]:
    """Compute the gradients of a step with packs of both datasets, and of the mean loss of each
    dataset's packs alone.
    """
    from megavlm.data.loading.blend import BlendedDataset
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    blend = BlendedDataset([PackedDataset(folder) for folder in folders])
    first = len(blend.datasets[0])
    chosen = np.array([0, 2, 3, first, first + 4])

    def gradient(ids: np.ndarray, weights: tuple[float, ...]) -> dict[str, np.ndarray]:
        divisors = blend.pack_weights(ids, blend.records(ids), "square", weights)
        layers = config.architecture.vision.num_layers
        packs = [blend.batch(int(number), 0, BatchOptions(vision_layers=layers)) for number in ids]
        job.ddp_chunks[0].zero_grad_buffer()
        run_packs(
            job.ddp_chunks,
            Microbatches(iter(packs), len(packs), 1.0, lambda batch: divisors[batch.pack_id]),
            job.backend,
        )
        return {
            key: weight.main_grad.numpy().copy()
            for key, weight in named_weights(job.chunks[0]).items()
        }

    both = gradient(chosen, WEIGHTS)
    return [both, gradient(chosen[:3], (1.0, 1.0)), gradient(chosen[3:], (1.0, 1.0))]


def test_gradients_are_the_weighted_sum_of_the_datasets_own(
    ranks: Pool, folders: list[Path]
) -> None:
    [(both, chats, images)] = ranks.run(gradients, 1, config_for(folders[0]), folders)
    for key, found in both.items():
        expected = WEIGHTS[0] * chats[key] + WEIGHTS[1] * images[key]
        limit = 1e-5 * np.abs(expected).max() + 1e-9
        np.testing.assert_allclose(found, expected, atol=limit, err_msg=key)


def _job(folders: list[Path], save: Path, **layout: int) -> Config:
    config = make_job(folders[0], save, **layout)
    data = dataclasses.replace(
        config.data,
        train=",".join(map(str, folders)),
        weights=(1.0, 3.0),
        batch_shares=True,
        loss_weights=WEIGHTS,
    )
    training = dataclasses.replace(config.training, global_batch_size=4, steps=3)
    control = Eval(control_interval=1)
    return dataclasses.replace(config, data=data, training=training, eval=control)


def _without_images(save: Path) -> list[float]:
    """Read the losses that the control passes of a run have recorded."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_without_images"] for line in lines if '"loss"' in line]


def test_a_step_is_the_same_on_two_replicas(
    ranks: Pool, folders: list[Path], tmp_path: Path
) -> None:
    ranks.run(run_job, 1, _job(folders, tmp_path / "one"))
    ranks.run(run_job, 2, _job(folders, tmp_path / "two"))
    found = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(found, rel=1e-5)
    blind = _without_images(tmp_path / "one")
    assert _without_images(tmp_path / "two") == pytest.approx(blind, rel=1e-5)
    assert blind[0] == pytest.approx(found[0], rel=0.02)
    config = _job(folders, tmp_path / "plain")
    plain = dataclasses.replace(config.data, loss_weights=())
    ranks.run(run_job, 1, dataclasses.replace(config, data=plain))
    # Fresh parameters have about the same loss on each token, and so on each dataset.
    assert found[0] == pytest.approx(sum(WEIGHTS) * losses(tmp_path / "plain")[0], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(loss_weights=(1.0,)), "1 weights for 2 folders"),
        (dict(loss_weights=(1.0, 0.0)), "each must be above 0"),
        (dict(batch_shares=False), "give --data.batch_shares true"),
    ],
)
def test_weights_that_cannot_be_are_refused(
    folders: list[Path], tmp_path: Path, changes: dict, reason: str
) -> None:
    config = _job(folders, tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    found = problems(config, 1)
    assert any("--data.loss_weights" in one and reason in one for one in found), found
