"""The example for several nodes, asked for all stages one after the other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megavlm.config.cli import parse
from tests.examples.test_cluster import FOLDER, asked
from tests.examples.test_cluster import shell as shell


def test_all_stages_ask_how_many_steps_they_take(shell: dict[str, str]):
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "all"], env=shell, capture_output=True, text=True
    )
    assert done.returncode != 0 and "STEPS: how many steps" in done.stderr
    assert not Path(shell["LOG"]).exists()


@pytest.mark.parametrize(
    ("done", "last"), [([], "1"), (["stage1"], "1.5"), (["stage1", "stage1_5"], "2")]
)
def test_a_stage_is_not_started_from_half_of_the_one_before(
    shell: dict[str, str], tmp_path: Path, done: list[str], last: str
):
    for name in ("stage1", "stage1_5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").write_text(f"step_{5 if name in done else 4:08d}")
    environment = shell | {"STEPS": "5", "RUNS": str(tmp_path)}
    subprocess.run(["bash", str(FOLDER / "run.sh"), "all"], env=environment, check=True)
    assert parse(get_args_parser().parse_args(asked(shell)).training_script_args).stage == last
