"""Test that models in the hub's cache are found by their ids."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from megavlm.config.cli import parse
from megavlm.config.hub_cache import file_name, short_name
from megavlm.model_source import image_model, read_model
from tests.convert.models import make_hf
from tests.convert.tool import run_tool

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a model into a cache of the hub, and return its folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--somebody--Tiny-1B"
    made = make_hf(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return made


def test_the_converter_reads_a_cached_snapshot(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["import", "--out", str(tmp_path / "start"), "--hf"]
    assert run_tool(*arguments, "somebody/Tiny-2B") == 2
    assert "download it first: hf download somebody/Tiny-2B" in capsys.readouterr().err
    assert run_tool(*arguments, "somebody/Tiny-1B") == 0
    assert (tmp_path / "start" / "shards").is_dir()
    words = ["--tokenizer", "somebody/Tiny-1B"]
    exported = ["export", "--load", str(tmp_path / "start"), "--out", str(tmp_path / "out")]
    assert run_tool(*exported, *words) == 0


def test_a_run_starts_from_a_cached_snapshot(snapshot: Path, tmp_path: Path) -> None:
    name = "somebody/Tiny-1B"
    config = parse(["--stage", "2", "--model", name, "--load", name], read_model)
    assert config.model == config.checkpoint.load == str(snapshot)
    assert config == parse(
        ["--stage", "2", "--model", str(snapshot), "--load", str(snapshot)], read_model
    )
    (tmp_path / "run.yaml").write_text(f"init: {{vision: {name}, language: nobody/Nothing}}\n")
    started = parse(["--stage", "1", "--model", "tiny", "--config", str(tmp_path / "run.yaml")])
    assert started.init.vision == str(snapshot)
    assert started.init.language == "nobody/Nothing"  # refused by the checks, as any missing folder
    assert image_model(str(snapshot)) == image_model(config.model)


def test_a_folder_of_the_name_goes_first(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "Tiny-1B").mkdir(parents=True)
    arguments = ["--stage", "2", "--model", "tiny", "--load", "somebody/Tiny-1B"]
    assert parse(arguments).checkpoint.load == "somebody/Tiny-1B"


def test_a_cached_snapshot_is_called_by_its_id(snapshot: Path, tmp_path: Path) -> None:
    assert short_name(snapshot) == f"somebody/Tiny-1B at {COMMIT}"
    assert file_name(snapshot) == "somebody--Tiny-1B"
    assert short_name(tmp_path) == tmp_path.name
    assert file_name(tmp_path / "run at 5") == "run at 5"
