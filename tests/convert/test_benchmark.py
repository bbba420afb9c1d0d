"""The benchmark of conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_of_conversion_runs_on_a_small_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/benchmark/convert.py",
        "--model",
        "tiny",
        "--layers",
        "2",
        "--repeat",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bytes"] > 1e6 and all(
        figures[f"{name}_gb_per_s"] > 0 for name in ("import", "export", "copy")
    )
    assert 0 < figures["peak_memory_gib"] < 2
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
