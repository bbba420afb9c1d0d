"""Which step of a folder is read, by training and by conversion alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megavlm.checkpoint import directory, step_folder, train_state
from megavlm.checkpoint.train_state import State
from megavlm.config.cli import to_yaml
from megavlm.config.schema import Config
from megavlm.convert.hf.convert import export


def _step(root: Path, step: int) -> Path:
    folder = root / directory.step_name(step)
    folder.mkdir(parents=True)
    train_state.write(State(step=step), folder)
    (folder / step_folder.CONFIG_NAME).write_text(to_yaml(Config(stage="1", model="tiny")))
    return folder


def test_a_step_or_the_step_that_latest_names_is_read(tmp_path: Path) -> None:
    assert step_folder.find(tmp_path) is None
    first = _step(tmp_path, 1)
    second = _step(tmp_path, 2)
    (tmp_path / "latest").write_text("step_00000001\n")
    assert step_folder.find(tmp_path).folder == first
    assert step_folder.find(second).state.step == 2


@pytest.mark.parametrize("content", ["", "\n", "\x00\x00"])
def test_an_empty_latest_counts_as_absent(tmp_path: Path, content: str) -> None:
    _step(tmp_path, 1)
    newest = _step(tmp_path, 2)
    (tmp_path / "latest").write_text(content)
    assert step_folder.find(tmp_path).folder == newest
    # Conversion reads the same step, and goes as far as the tensors, which are not there.
    with pytest.raises(FileNotFoundError, match=f"{newest.name}/shards"):
        export(tmp_path, tmp_path / "out")


def test_conversion_says_if_no_checkpoint_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint is there"):
        export(tmp_path, tmp_path / "out")


def test_the_folder_of_several_stages_is_told_by_its_runs(tmp_path: Path) -> None:
    _step(tmp_path / "stage_2", 6)
    _step(tmp_path / "stage_1", 4)
    (tmp_path / "notes.txt").touch()
    runs = f"{tmp_path / 'stage_1'}, {tmp_path / 'stage_2'}"
    with pytest.raises(FileNotFoundError, match=f"holds the runs {re.escape(runs)}: name one"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_an_incomplete_step_is_refused(tmp_path: Path, name: str) -> None:
    (_step(tmp_path, 1) / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        step_folder.find(tmp_path)
