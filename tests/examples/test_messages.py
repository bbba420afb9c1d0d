"""What the scripts for a cluster say to their user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megavlm.config.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "command", "name"),
    [
        ("qwen2_5_vl/run.sh", ["pack", "finetune", "--max_frames", "8"], "finetune"),
        ("blip2/run.sh", ["pack1"], "stage1"),
        ("blip2/run.sh", ["pack"], "stage2"),
        ("internvl2_5_8b/run.sh", ["pack"], "stage1_5"),
        ("preference/mpo.sh", ["pack", "--workers", "3"], "mpo"),
    ],
)
def test_a_script_says_that_it_leaves_packs_alone(
    tmp_path: Path, script: str, command: list[str], name: str
) -> None:
    for one in {name, "stage1", "stage2"}:  # InternVL's script packs three
        (tmp_path / "packs" / one).mkdir(parents=True)
        (tmp_path / "packs" / one / "manifest.json").touch()
    parts = {"PACKS": str(tmp_path / "packs"), "DATA": "data", "TOKENIZER": "words"}
    parts |= {"MODEL": "model", "META": "meta.json"}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), *command],
        env=os.environ | parts,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert f"{tmp_path / 'packs' / name} is packed already, so nothing is done" in done.stderr


def test_qwens_script_names_the_stages_of_its_recipe() -> None:
    command = ["bash", str(ROOT / "examples" / "qwen2_5_vl" / "run.sh"), "nothing"]
    for recipe in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        done = subprocess.run(
            command, env=os.environ | {"RECIPE": recipe}, capture_output=True, text=True
        )
        named = done.stderr.partition("pack STAGE | ")[2].partition(" [option")[0]
        assert done.returncode == 2 and named.split(" | ") == list(RECIPES[recipe].stages)
