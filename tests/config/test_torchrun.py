"""The variables that torchrun sets, and the file that it reads why a rank ended from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.config import torchrun

ROOT = Path(__file__).parents[2]
SET = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE")


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 in the environment, but not RANK, MASTER_ADDR"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="here"), "but not MASTER_PORT"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two in the environment: not a number"),
        (dict(WORLD_SIZE=""), "WORLD_SIZE= in the environment: not a number"),
        (dict(RANK="-1"), "RANK=-1 in the environment: not a number"),
        (dict(RANK="1"), "RANK=1 in the environment, but WORLD_SIZE is 1"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_refused(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert any(told in problem for problem in torchrun.problems())


@pytest.mark.parametrize("variables", [dict(WORLD_SIZE="2"), dict(RANK="1")])
def test_the_program_refuses_such_an_environment(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_vlm.py"), "--stage", "1", "--model", "tiny"],
        env={name: value for name, value in os.environ.items() if name not in SET}
        | {"PYTHONPATH": str(ROOT)}
        | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2 and " in the environment, but " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_none_and_all_of_the_variables_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun.problems() == []
    for name, value in zip(SET, ("2", "1", "1", "localhost", "29500"), strict=False):
        monkeypatch.setenv(name, value)
    assert torchrun.problems() == []
    assert (torchrun.world_size(), torchrun.rank()) == (2, 1)


def test_too_few_open_files_for_the_connections_of_all_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torchrun.resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = {}
    for size, number in ((240, 0), (241, 0), (1024, 0), (1024, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("RANK", str(number))
        found[size, number] = torchrun.problems()
    assert not found[240, 0] and not found[1024, 1], "the first rank says it for all"
    assert found[241, 0][0].startswith(
        "ulimit -n 1024: the store of torchrun needs 1028 open files"
    )
    assert "4160 open files for 1024 ranks" in found[1024, 0][0]


@pytest.mark.parametrize("is_printed", [True, False])
def test_a_refusal_is_left_where_torchrun_reads_it(
    is_printed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    torchrun.refuse("error: no packs", is_printed=is_printed)
    assert capsys.readouterr().err == ("error: no packs\n" if is_printed else "")
    assert json.loads(path.read_text())["message"]["extraInfo"]["py_callstack"] == "error: no packs"


def test_of_a_long_refusal_the_beginning_is_repeated_for_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    text = f"error: step 7, on packs {list(range(4096))}"
    torchrun.refuse(text)
    left = json.loads(path.read_text())["message"]["message"]
    assert capsys.readouterr().err == f"{text}\n"
    assert left.startswith(text[:2000]) and "told once" in left and len(left) < 2100


def test_checks_that_need_no_model_run_without_torch(tmp_path: Path) -> None:
    """A folder in front of all others holds a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    command = [sys.executable, str(ROOT / "pretrain_vlm.py"), "--stage", "1", "--model", "tiny"]
    environment = {name: value for name, value in os.environ.items() if name not in SET}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments],
            env=environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=240,
        )

    wrong = ("--lr", "0", "--seed", str(2**70), "--data.train", str(tmp_path))
    for arguments in (wrong, (*wrong, "--check")):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "problems with the configuration" in done.stderr
        assert f"--training.seed {2**70}: must be at most" in done.stderr
        assert "--optimizer.lr 0.0: must be above 0" in done.stderr
        assert f"--data.train {tmp_path}" in done.stderr
    shown = run(*wrong, "--print_config")
    assert shown.returncode == 0 and shown.stdout.startswith("recipe: internvl\nstage: '1'")
    assert "the run would be refused" in shown.stderr and "--optimizer.lr 0.0" in shown.stderr
