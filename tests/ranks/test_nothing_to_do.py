"""The command of a run that is done, checkpoints that are found, and steps that are not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megavlm.checkpoint.step_folder import find
from megavlm.config.checks.saving import exported_step
from megavlm.config.schema import Config
from megavlm.convert.hf import convert
from megavlm.data.store.manifest import read_manifest
from megavlm.io import atomic
from megavlm.train.bad_steps import StepError
from megavlm.train.unchecked_norms import UncheckedNorms
from tests.ranks.pool import Pool
from tests.ranks.test_changed_options import output_of_job
from tests.ranks.test_whole_way import packs as packs
from tests.ranks.test_whole_way import whole_config

STEPS = 3


def export_that_is_killed(config: Config) -> str:
    """Run a job that ends in the moment in which its export has got its name."""

    def rename_and_stop(growing: Path, target: Path) -> None:
        growing.rename(target)
        for lock in target.parent.glob(".growing_*.lock"):  # kill -9 leaves it
            os.link(lock, target.parent / "kept")
        raise KeyboardInterrupt

    with mock.patch.object(atomic, "publish", rename_and_stop):
        try:
            return output_of_job(config)
        except KeyboardInterrupt:
            export = Path(config.checkpoint.export_hf)
            (export.parent / "kept").rename(export.with_name(f".growing_{export.name}.lock"))
            return "killed"


def test_the_command_of_a_finished_run_is_no_failure_and_exports_once(
    ranks: Pool, packs: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    [shown] = ranks.run(output_of_job, 1, whole_config(packs, save))
    count = read_manifest(packs).totals.packs
    assert f"data: {count} packs; {STEPS} steps of 2 are {2 * STEPS / count:.2f} epochs\n" in shown
    for name in ("latest", "junk", "missing"):  # three ways in which a folder is found
        latest = save / "latest"
        if name == "junk":
            latest.write_text("?")
        elif name == "missing":
            latest.unlink()
        found = find(str(save))
        assert found is not None and found.state.step == STEPS
    (tmp_path / "empty").mkdir()
    assert find(str(tmp_path / "empty")) is None
    export = tmp_path / "exported"
    wanted = whole_config(packs, save, export_hf=str(export))
    other = whole_config(packs, save, export_hf=str(tmp_path / "other"))
    assert ranks.run(export_that_is_killed, 1, other) == ["killed"]
    [shown] = ranks.run(output_of_job, 1, other)
    assert "holds the model of this run already" in shown
    assert not list(tmp_path.glob(".growing*"))
    [shown] = ranks.run(output_of_job, 1, wanted)
    assert f"nothing to do: step {STEPS} is done, and --training.steps is {STEPS}" in shown
    assert re.search(rf"^exported {export} in [0-9.]+ s$", shown, re.MULTILINE)
    assert (export / "config.json").is_file()
    before = (export / "config.json").stat().st_mtime_ns
    [shown] = ranks.run(output_of_job, 1, wanted)
    assert "holds the model of this run already" in shown
    assert (export / "config.json").stat().st_mtime_ns == before
    # The average of the weights is another model.
    files = wanted.checkpoint
    assert exported_step(files, averages=False) == STEPS
    assert exported_step(files, averages=True) is None
    # What somebody else put there is not this run's.
    (save / "exported.json").write_text(json.dumps({"folder": "elsewhere", "step": STEPS}))
    with pytest.raises(AssertionError, match="exists already and is not an empty folder"):
        ranks.run(output_of_job, 1, wanted)
    shutil.rmtree(export)
    elsewhere = whole_config(packs, tmp_path / "new", load=str(save), export_hf=str(export))
    [shown] = ranks.run(output_of_job, 1, elsewhere)
    assert "nothing to do" in shown and (export / "config.json").is_file()


def test_a_stage_that_starts_from_a_longer_one_exports_its_own_model(
    ranks: Pool, packs: Path, tmp_path: Path
) -> None:
    first = whole_config(packs, tmp_path / "first")
    ranks.run(output_of_job, 1, first)
    export = tmp_path / "exported"
    config = whole_config(packs, tmp_path / "second", load=str(tmp_path / "first"))
    shorter = dataclasses.replace(config.training, steps=STEPS - 1, trainable=("connector",))
    config = dataclasses.replace(config, stage="1", training=shorter)
    files = dataclasses.replace(config.checkpoint, export_hf=str(export))
    ranks.run(output_of_job, 1, dataclasses.replace(config, checkpoint=files))
    weights = (export / "model.safetensors").read_bytes()
    for name, is_same in (("second", True), ("first", False)):
        convert.export(str(tmp_path / name), str(tmp_path / f"{name}_hf"))
        assert ((tmp_path / f"{name}_hf" / "model.safetensors").read_bytes() == weights) is is_same


def test_a_step_that_is_not_finite_is_named_as_the_console_does_with_its_packs() -> None:
    norms = UncheckedNorms()
    assert norms.check(torch.tensor(2.5)) == 2.5, "of a step that had no update"
    norms.add(7, np.array([3, 1]), torch.tensor(1.5))
    assert norms.check(torch.tensor(2.5)) == 1.5, "of the last update"
    norms.add(8, np.array([4, 2]), torch.tensor(float("nan")))
    norms.add(9, np.array([5, 6]), torch.tensor(float("nan")))
    with pytest.raises(StepError, match=r"step 8: the gradient's norm is nan.*\[4, 2\]"):
        norms.check(torch.tensor(2.5))
