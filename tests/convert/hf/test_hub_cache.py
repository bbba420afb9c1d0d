"""Test that models in the hub's cache are found by their ids."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.convert.models import make_hf
from tests.convert.tool import run_tool


def test_a_hub_id_means_the_cached_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--somebody--Tiny-1B"
    make_hf(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    arguments = ["import", "--out", str(tmp_path / "start"), "--hf"]
    assert run_tool(*arguments, "somebody/Tiny-2B") == 2
    assert "download it first: hf download somebody/Tiny-2B" in capsys.readouterr().err
    assert run_tool(*arguments, "somebody/Tiny-1B") == 0
    assert (tmp_path / "start" / "shards").is_dir()
