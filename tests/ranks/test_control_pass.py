"""The loss of training packs without their images is that of the same packs held out, by the
weights that the step begins with.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavlm.config.schema import Eval
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_resume import INTERLEAVED, make_job, run_job

PACKS = 4
LAYOUTS = {"one process": (1, {}), "interleaved": (2, INTERLEAVED)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_loss_is_that_of_the_packs_without_images(
    ranks: Pool, tmp_path: Path, layout: str
) -> None:
    world, settings = LAYOUTS[layout]
    make_packs(tmp_path / "packs", packs=PACKS, image_share=0.6)
    settings = dict(drop_path=0.0, eval_interval=1, save_interval=0) | settings
    settings |= dict(global_batch_size=PACKS)
    config = make_job(tmp_path / "packs", tmp_path / "run", **settings)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, valid=str(tmp_path / "packs")),
        training=dataclasses.replace(config.training, steps=3),
        eval=Eval(without_images=True, control_interval=2),
    )
    ranks.run(run_job, world, config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    [row] = [row for row in rows if "loss_without_images" in row]
    assert row["step"] == 2
    [held_out] = [row for row in rows if row["step"] == 1 and "valid_loss" in row]
    assert row["loss"] == pytest.approx(held_out["valid_loss"], rel=1e-5)
    blind = held_out["valid_loss_without_images"]
    assert row["loss_without_images"] == pytest.approx(blind, rel=1e-6)
    assert abs(row["loss_without_images"] - row["loss"]) > 1e-3
