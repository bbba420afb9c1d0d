"""A job that is to end, fails or is done, with stand-ins for torchrun and Slurm's commands."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megavlm.config.cli import parse
from tests.examples.test_cluster import FOLDER, ROOT, asked
from tests.examples.test_cluster import shell as shell


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_reaches_torchrun_once(shell: dict[str, str], tmp_path: Path, how: str):
    environment = shell | {"STEPS": "5", "LINGERS": "yes", "STOP_FILE": str(tmp_path / "stop")}
    with subprocess.Popen(["bash", str(FOLDER / "run.sh"), "all"], env=environment) as run:
        wait_for(Path(shell["LOG"]))
        if how == "signal":
            run.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "stop").touch()
        assert run.wait(timeout=120) != 0, "the stages that follow are not started"
    assert Path(shell["LOG"] + ".signals").read_text() == "TERM\n"
    assert parse(get_args_parser().parse_args(asked(shell)).training_script_args).stage == "1"


def test_slurm_starts_a_stage_on_every_node_and_requeues_a_job_that_was_asked_to_end(
    shell: dict[str, str], tmp_path: Path
):
    job = {
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sh"), "2", "--training.seed", "9"],
        env=shell | job | {"LINGERS": "yes"},
        cwd=tmp_path,
    ) as run:
        wait_for(Path(shell["LOG"]))
        options = get_args_parser().parse_args(asked(shell))
        assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == (
            "2",
            "4",
            "node7:20123",
        )
        assert parse(options.training_script_args).training.seed == 9
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=120)
    assert Path(shell["LOG"] + ".signals").read_text() == "TERM\n"
    assert Path(shell["LOG"] + ".scontrol").read_text() == "requeue 123 "
    assert not list(tmp_path.glob(".stop-*"))


def test_slurm_does_not_requeue_a_job_that_is_done(shell: dict[str, str], tmp_path: Path):
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node7"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(["bash", str(FOLDER / "slurm.sh"), "2"], env=shell | job, cwd=tmp_path)
    assert done.returncode == 0 and not Path(shell["LOG"] + ".scontrol").exists()


@pytest.mark.parametrize(
    ("status", "saved", "goes_on"),
    [
        ("1", "step_00000200", True),
        ("1", "step_00000100", False),
        ("1", "", False),
        ("0", "step_00000200", False),
    ],
)
def test_slurm_requeues_a_job_that_failed_if_it_has_saved(
    shell: dict[str, str], tmp_path: Path, status: str, saved: str, goes_on: bool
):
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node7"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs" / "stage2").mkdir(parents=True)
    (tmp_path / "runs" / "stage2" / "latest").write_text("step_00000100\n")
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), "2"],
        env=shell | job | {"STATUS": status, "SAVES": saved},
        cwd=tmp_path,
    )
    assert done.returncode == int(status)
    assert Path(shell["LOG"] + ".scontrol").exists() == goes_on


def wait_for(path: Path) -> None:
    """Until a file is there and has been written."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)
