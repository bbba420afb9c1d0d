"""The benchmark of conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks.pool import copying
from tools.benchmark import convert


@pytest.mark.slow
def test_the_benchmark_of_conversion_runs_on_a_small_model(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--layers", "2", "--repeat", "1"]
    words += ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    with copying():
        assert convert.main(words) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bytes"] > 1e6 and all(
        figures[f"{name}_gb_per_s"] > 0 for name in ("import", "export", "copy")
    )
    assert 0 < figures["peak_memory_gib"] < 2
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
