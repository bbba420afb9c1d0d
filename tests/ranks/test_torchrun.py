"""``pretrain_vlm.py`` as users start it: under torchrun, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megavlm.config.cli import from_yaml, to_yaml
from tests.data.samples import make_dataset
from tests.ranks import commands
from tests.ranks.runs import config_for

ROOT = Path(__file__).parents[2]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    str(ROOT / "pretrain_vlm.py"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    make_dataset(
        folder / "train",
        packs=8,
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=4,
        capacity=128,
    )
    (folder / "run.yaml").write_text(to_yaml(config_for(folder / "train")))
    return folder / "run.yaml"


def _torchrun(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


def test_the_resolved_configuration_is_printed_once() -> None:
    done = _torchrun("--print_config", "--stage", "1.5", "--model", "tiny")
    assert done.returncode == 0, done.stderr
    config = from_yaml(done.stdout)
    assert (
        config.stage == "1.5"
        and config.training.trainable == ("vision", "connector")
        and config.optimizer.lr == 1e-5
    )


def test_a_refusal_is_told_before_anything_starts_and_again_below_the_traceback_of_torchrun(
    config_file: Path,
) -> None:
    flag = "--parallel.pipeline_model_parallel_size 4"
    done = _torchrun("--config", str(config_file), *flag.split())
    assert done.returncode != 0
    first, *_, last = (place.start() for place in re.finditer(re.escape(flag), done.stderr))
    assert done.stderr.count(flag) == 2
    assert "Traceback" not in done.stderr[:first]  # that of torchrun comes after it
    assert "Traceback" not in done.stderr[last:] and "ChildFailedError" in done.stderr[first:last]


@pytest.mark.parametrize(
    ("of_rank_1", "told"),
    [
        ("more='--data.train elsewhere'", ["rank 1 (", "--data.train elsewhere: no such path"]),
        ("more='--config missing.yaml'", ["error on rank 1 (", "missing.yaml: no such file"]),
        ("export GLOO_SOCKET_IFNAME=x", ["rank 1 (", "GLOO_SOCKET_IFNAME=x in the environment"]),
    ],
)
def test_a_rank_that_was_started_otherwise_is_named(
    config_file: Path, of_rank_1: str, told: list[str]
) -> None:
    start = f"{sys.executable} {TORCHRUN[-1]} --config {config_file} --checkpoint.save_interval 0"
    command = f"if [ $RANK = 1 ]; then {of_rank_1}; fi; exec {start} $more"
    done = subprocess.run(
        [*TORCHRUN[:-1], "--no-python", "bash", "-c", command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert all(words in done.stderr for words in told), done.stderr
    assert "step 1 " not in done.stdout
    told_once, _, _ = done.stderr.partition("ChildFailedError")  # torchrun repeats it
    assert told_once.count("error:") + told_once.count("error on") == 1


def test_ranks_that_were_started_with_other_settings_are_told_so(
    config_file: Path, tmp_path: Path
) -> None:
    usual = ["--config", str(config_file), "--checkpoint.save_interval", "0"]
    done = commands.run([usual, [*usual, "--training.seed", "8"]], tmp_path / "told")
    assert done.returncode != 0 and "step 1 " not in done.stdout
    assert "rank 1 (" in done.stderr and "--training.seed is 8 (rank 0: 3)" in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr


def test_sigterm_ends_a_run_after_a_checkpoint_and_the_same_command_goes_on(
    config_file: Path, tmp_path: Path
) -> None:
    arguments = [
        "--config",
        str(config_file),
        "--checkpoint.save",
        str(tmp_path / "run"),
        "--training.steps",
        "100000",
    ]
    arguments += ["--checkpoint.save_interval", "0", "--optimizer.schedule", "constant"]
    # Torchrun signals the loader workers too, and the steps up to the next logged one still need
    # their batches.
    arguments += ["--logging.interval", "3", "--data.workers", "1", "--data.prefetch", "1"]
    usual = {name: ENVIRONMENT[name] for name in ENVIRONMENT.keys() - {"TORCHDYNAMO_DISABLE"}}
    with (
        (tmp_path / "told").open("w") as told,
        subprocess.Popen(
            [*TORCHRUN, *arguments],
            env=usual | {"PYTHONPROFILEIMPORTTIME": "1"},
            stdout=told,
            stderr=subprocess.STDOUT,
        ) as run,
    ):
        _wait_for_step(tmp_path / "run" / "metrics.jsonl", 3)
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=120)
    output = (tmp_path / "told").read_text()
    assert "stopped by a signal after step" in output
    # Without a GPU, torch's compiler is not loaded, for seconds.
    assert " megatron.core\n" in output
    assert torch.cuda.is_available() or "torch._functorch.aot_autograd" not in output
    stopped = int((tmp_path / "run" / "latest").read_text().strip().removeprefix("step_"))
    assert stopped >= 3 and stopped % 3 == 0
    arguments += ["--training.steps", str(stopped + 2), "--data.workers", "0"]
    done = commands.run([arguments] * 2, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {stopped}" in done.stdout
    assert _trained_steps(tmp_path / "run" / "metrics.jsonl") == [
        *range(3, stopped + 1, 3),
        stopped + 2,
    ]


def test_a_second_run_in_the_same_folder_is_refused_before_anything_is_deleted(
    config_file: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    arguments = ["--config", str(config_file), "--checkpoint.save", str(save)]
    arguments += ["--training.steps", "100000", "--optimizer.schedule", "constant"]
    arguments += ["--checkpoint.save_interval", "0", "--logging.interval", "1"]
    [first] = commands.start([arguments], tmp_path / "first")
    try:
        _wait_for_step(save / "metrics.jsonl", 1)
        (save / ".growing_step_00000001_0a1b2c3d").mkdir()
        os.kill(first.pid, signal.SIGSTOP)  # or its steps would take the cores from the other
        second = commands.run([arguments] * 2, tmp_path / "second")
        os.kill(first.pid, signal.SIGCONT)
        still_runs = first.is_alive()
        is_whole = (save / ".growing_step_00000001_0a1b2c3d").exists()
    finally:
        first.kill()
        first.join()
    told = f"--checkpoint.save {save}: another run writes to this folder (process {first.pid} on"
    assert still_runs and is_whole and second.returncode != 0
    assert second.stderr.count(told) == 1 and "Traceback" not in second.stderr, second.stderr
    # The lock of a killed run holds nobody up.
    done = commands.run([[*arguments, "--training.steps", "2"]], tmp_path / "done")
    assert done.returncode == 0, done.stderr
    assert "what a killed run left: .growing_step_00000001_0a1b2c3d" in done.stdout
    assert not list(save.glob(".lock*"))


def test_a_step_that_is_not_finite_is_one_sentence(config_file: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config_file), "--checkpoint.save", str(tmp_path / "run")]
    arguments += ["--checkpoint.save_interval", "1", "--logging.interval", "1"]
    arguments += ["--optimizer.lr", "1e30", "--optimizer.schedule", "constant"]
    done = commands.run([arguments] * 2, tmp_path / "told")
    assert done.returncode != 0
    told = re.findall(
        r"^error: step (\d+): the gradient's norm is (?:nan|inf) on packs", done.stderr, re.M
    )
    assert len(told) == 1, done.stderr
    assert "Traceback" not in done.stderr
    # The checkpoint that is named there is from before the step.
    latest = (tmp_path / "run" / "latest").read_text().strip()
    assert latest == f"step_{int(told[0]) - 1:08d}"


def _trained_steps(path: Path) -> list[int]:
    """List the steps whose loss is recorded, leaving out a line that is still being written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if "loss" in record]


def _wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while step not in _trained_steps(path):
        assert time.monotonic() < deadline, f"no {step} steps after two minutes"
        time.sleep(0.2)
