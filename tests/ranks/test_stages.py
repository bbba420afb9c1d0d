"""Three stages in one command under torchrun, killed in the second and started again."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from megavlm.config.cli import to_yaml
from megavlm.config.schema import Checkpoint, Logging
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs
from tests.ranks.test_resume import saved_tensors
from tests.ranks.test_torchrun import ENVIRONMENT, TORCHRUN, _trained_steps, _wait_for_step


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Make packs for each stage; return the command without its save folder."""
    folder = tmp_path_factory.mktemp("stages")
    for name, packs in (("1", 6), ("1.5", 8), ("2", 10)):
        make_packs(folder / f"packs_{name}", packs=packs, image_share=0.7)
    config = config_for(folder / "packs_1", steps=2, global_batch_size=2)
    config = dataclasses.replace(
        config, checkpoint=Checkpoint(save="runs", save_interval=2), logging=Logging(interval=1)
    )
    (folder / "run.yaml").write_text(to_yaml(config))
    return [
        *(*TORCHRUN, "--config", str(folder / "run.yaml"), "--stage", "1,1.5,2"),
        *("--training.max_hours", "100"),
        *("--for", "1", "--training.trainable connector"),
        *("--for", "1.5", f"--data.train {folder / 'packs_1.5'} --training.steps 14"),
        *("--for", "2", f"--data.train {folder / 'packs_2'}"),
    ]


def run(command: list[str], save: Path) -> str:
    whole = [*command, "--checkpoint.save", str(save)]
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stages_that_were_killed_and_started_again_end_bit_for_bit_alike(
    ranks: Pool, command: list[str], tmp_path: Path
) -> None:
    run(command, tmp_path / "whole")
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [*command, "--checkpoint.save", str(killed)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:
        _wait_for_step(killed / "stage_1.5" / "metrics.jsonl", 3)
        job = psutil.Process(started.pid)
        for process in [job, *job.children(recursive=True)]:  # ranks have sessions of their own
            process.kill()
    assert not (killed / "stage_2").exists()
    again = run(command, killed)
    # The first stage is not built again; the second resumes; the third starts from it.
    assert "stage 1," not in again and "resuming after step" in again
    assert (
        f"start: {killed / 'stage_1.5' / 'step_00000014'} (stage 1.5, step 14): its weights"
        in again
    )
    assert _trained_steps(killed / "stage_2" / "metrics.jsonl") == [1, 2]
    for stage in ("stage_1.5/step_00000014", "stage_2/step_00000002"):
        [expected], [found] = (
            ranks.run(saved_tensors, 1, tmp_path / name / stage) for name in ("whole", "killed")
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), stage
