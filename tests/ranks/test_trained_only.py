"""Checkpoints without what is frozen: small, resumed bit for bit, refused without their base."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavlm.checkpoint import step_folder
from megavlm.config.checks.rules import ConfigError
from megavlm.config.lora import Lora
from megavlm.config.schema import Config
from megavlm.train import base_weights
from megavlm.train.inspection import inspect
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_resume import STEPS, forget_the_end, losses, make_job, run_job, saved_tensors

PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
MASK = ("connector", "language.*.lora")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.6, alignment=4)
    return folder


def adapted(dataset: Path, save: Path, load: Path, *, trained_only: bool = True) -> Config:
    """Configure a run that trains connector and adapters, at PP 2."""
    config = make_job(dataset, save, load, trainable=MASK, trained_only=trained_only, **PIPELINE)
    lora = Lora(rank=4, targets=("language",))
    return dataclasses.replace(
        config, architecture=dataclasses.replace(config.architecture, lora=lora)
    )


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


def test_a_run_resumes_from_its_adapters_and_its_base_alone(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    ranks.run(run_job, 1, make_job(dataset, base, stage="1", trainable=("connector",)))
    for name, only in (("plain", False), ("whole", True)):
        ranks.run(run_job, 2, adapted(dataset, tmp_path / name, base, trained_only=only))
    assert losses(tmp_path / "whole") == losses(tmp_path / "plain")
    small, middle = (tmp_path / name / "step_00000003" for name in ("whole", "plain"))
    assert bytes_of(small) < 0.7 * bytes_of(middle)
    [held] = ranks.run(saved_tensors, 1, small)
    weights = {key for key in held if key.startswith("model.")}
    assert weights and all("lora" in key or "connector" in key for key in weights)

    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    # Which the run would not resume from.
    earlier = tmp_path / "killed" / "step_00000002"
    shutil.copytree(small, earlier)
    with pytest.raises(ConfigError, match="write step_00000002 into .*/latest"):
        inspect(adapted(dataset, tmp_path / "killed", earlier), 2)
    with pytest.raises(ValueError, match="these are not the weights that .*\n.*: missing"):
        inspect(adapted(dataset, tmp_path / "killed", tmp_path), 2)
    for itself in (tmp_path / "killed", tmp_path / "killed" / small.name):
        inspect(adapted(dataset, tmp_path / "killed", itself), 2)
    forget_the_end(tmp_path / "whole", tmp_path / "left_out")
    for name, only in (("killed", True), ("left_out", False)):
        ranks.run(run_job, 2, adapted(dataset, tmp_path / name, base, trained_only=only))
        assert losses(tmp_path / name) == losses(tmp_path / "plain")[3:]
    last = f"step_{STEPS:08d}"
    found = [
        ranks.run(saved_tensors, 1, tmp_path / name / last)[0]
        for name in ("plain", "whole", "killed", "left_out")
    ]
    for other in found[1:]:  # the last checkpoint is whole
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[key], found[0][key]) for key in other)

    # More steps of a run that ended would make checkpoints over a base that is gone.
    again = adapted(dataset, tmp_path / "killed", "")
    more = replace(again, training=replace(again.training, steps=STEPS + 2))
    start = step_folder.read(tmp_path / "killed" / last)
    assert base_weights.note(more, start, None) == start.state.base
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"(?s)checkpoints to come would hold trained .*: missing"):
        inspect(more, 2)  # before anything is built
    assert inspect(again, 2).state.step == STEPS, "the command of a run that is done is no failure"
    inspect(replace(more, checkpoint=replace(more.checkpoint, trained_only=False)), 2)
    named = dataclasses.replace(more.checkpoint, load=str(tmp_path / "elsewhere"))
    more = replace(more, checkpoint=named)
    assert inspect(more, 2).state.step == STEPS
    other = replace(named, load=str(tmp_path / "plain" / last))
    with pytest.raises(ValueError, match="plain/.*: these are not the weights that"):
        inspect(replace(more, checkpoint=other), 2)
    moved = base_weights.note(more, start, None)
    assert moved.files == start.state.base.files and "elsewhere" in moved.folders[0]

    # Nothing but the run itself can read a checkpoint of adapters.
    with pytest.raises(ValueError, match="holds trained parameters only"):
        step_folder.find(small)


def test_the_base_is_known_by_its_content_wherever_it_is(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    base = runs / "base"
    packs = tmp_path / "packs"
    shutil.copytree(dataset, packs)
    ranks.run(run_job, 1, make_job(packs, base, stage="1", trainable=("connector",)))
    step = base / f"step_{STEPS:08d}"
    ranks.run(run_job, 2, adapted(packs, runs / "whole", step))
    forget_the_end(runs / "whole", runs / "run")
    shutil.rmtree(packs)  # what lies below does not depend on where the data were

    # All of it is moved: the base is where it was, as seen from the run.
    moved = tmp_path / "moved"
    runs.rename(moved)
    inspect(adapted(dataset, moved / "run", ""), 2)
    # It is elsewhere: the command names its folder, or that of its run.
    elsewhere = tmp_path / "elsewhere"
    (moved / "base").rename(elsewhere)
    with pytest.raises(ValueError, match=r"what lies below them is not there:\n.*: missing"):
        inspect(adapted(dataset, moved / "run", ""), 2)
    for named in (elsewhere / step.name, elsewhere):
        inspect(adapted(dataset, moved / "run", named), 2)
    shard = max((elsewhere / step.name / "shards").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)  # of the same size, at the same place
    with pytest.raises(AssertionError, match="is no longer what they were trained on"):
        ranks.run(run_job, 2, adapted(dataset, moved / "run", elsewhere))
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ranks.run(run_job, 2, adapted(dataset, moved / "run", elsewhere))
    assert losses(moved / "run") == losses(moved / "whole")[3:]
    # Checkpoints to come name the new place.
    found = step_folder.read(moved / "run" / f"step_{STEPS:08d}")
    assert found.state.base.folders == (str(elsewhere / step.name),)


def test_a_later_stage_resumes_from_what_the_stage_before_it_trained(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """Train other parameters in each stage, so that what stage 2 freezes is not the base's."""

    def stage(name: str, load: Path, part: str) -> Config:
        mask = (f"{part}.*",)
        where = tmp_path / name
        only = dict(trained_only=True, drop_path=0.0, lr=1e-2, warmup_ratio=0.0)
        return make_job(dataset, where, load, stage=name[0], trainable=mask, **only)

    base = tmp_path / "0"
    ranks.run(run_job, 1, make_job(dataset, base, stage="1.5", trainable=("connector",)))
    # The same base lies below stage 1, which must not be that of stage 2.
    ranks.run(run_job, 1, stage("1", base, "vision"))
    whole = stage("2", tmp_path / "1", "language.decoder.layers.1")
    ranks.run(run_job, 1, whole)
    last = f"step_{STEPS:08d}"
    assert step_folder.read(tmp_path / "2" / last).state.base.folders == (
        str(tmp_path / "1" / last),
    )
    forget_the_end(tmp_path / "2", tmp_path / "2 killed")
    killed = stage("2 killed", tmp_path / "1", "language.decoder.layers.1")
    # Another model of the same shape is no place to fill the frozen weights from.
    other = dataclasses.replace(killed.checkpoint, load=str(base))
    with pytest.raises(ValueError, match="--checkpoint.load .*these are not the weights that"):
        inspect(dataclasses.replace(killed, checkpoint=other), 1)
    ranks.run(run_job, 1, killed)
    expected, found = (
        ranks.run(saved_tensors, 1, tmp_path / name / last)[0] for name in ("2", "2 killed")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
