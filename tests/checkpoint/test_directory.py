"""A save folder: what counts as a checkpoint in it, which ones go, and what a power cut leaves."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from megavlm.checkpoint import directory, train_state
from megavlm.checkpoint.train_state import State


def _checkpoint(root: Path, step: int, loss: float | None = None, figures: tuple = ()) -> Path:
    made = root / directory.step_name(step)
    made.mkdir(parents=True)
    train_state.write(State(step=step, valid_loss=loss, figures=figures), made)
    return made


def _steps(root: Path) -> list[int]:
    return sorted(directory.step_of(entry) for entry in root.glob("step_*"))


def test_latest_is_tried_first_and_then_what_is_older(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        _checkpoint(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000300\n")
    assert [entry.name for entry in directory.candidates(tmp_path)] == [
        "step_00000300",
        "step_00000200",
        "step_00000100",
    ]


def test_latest_is_tried_first_when_its_folder_is_gone_so_that_somebody_is_told(
    tmp_path: Path,
) -> None:
    _checkpoint(tmp_path, 100)
    (tmp_path / "latest").write_text("step_00000300\n")
    assert [entry.name for entry in directory.candidates(tmp_path)] == [
        "step_00000300",
        "step_00000100",
    ]


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\xfe", b"step_xyz", b"../../etc"])
def test_without_a_readable_latest_the_newest_comes_first(
    tmp_path: Path, content: bytes | None
) -> None:
    for step in (9, 10, 100):
        _checkpoint(tmp_path, step)
    (tmp_path / ".growing_step_00000200_ab").mkdir()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert [directory.step_of(entry) for entry in directory.candidates(tmp_path)] == [100, 10, 9]


def test_publishing_renames_and_then_moves_latest(tmp_path: Path) -> None:
    for text in ("one", "two"):
        growing = tmp_path / directory.growing_name(7)
        (growing / "shards").mkdir(parents=True)
        (growing / "shards" / "a").write_text(text)
        directory.publish(growing, tmp_path / "step_00000007")
        assert (tmp_path / "step_00000007" / "shards" / "a").read_text() == text
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000007"]


def test_two_attempts_at_a_checkpoint_have_folders_of_their_own() -> None:
    assert directory.growing_name(7) != directory.growing_name(7)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in ((1, math.nan), (2, 0.5), (3, 0.7), (4, 0.6), (5, None), (6, 0.9)):
        _checkpoint(tmp_path, step, loss)
    directory.drop_old(tmp_path, tmp_path / directory.step_name(6), keep=2, keep_best=2)
    assert _steps(tmp_path) == [2, 4, 5, 6]
    directory.drop_old(tmp_path, tmp_path / directory.step_name(6), keep=1, keep_best=0)
    assert _steps(tmp_path) == [6]


def test_the_best_may_be_by_a_figure_of_a_task(tmp_path: Path) -> None:
    for step, figure in ((1, 0.9), (2, math.inf), (3, None), (4, 0.5), (5, 0.2)):
        figures = () if figure is None else (("exam/accuracy", figure), ("pope/f1", 1 - figure))
        _checkpoint(tmp_path, step, loss=figure, figures=figures)
    newest = tmp_path / directory.step_name(5)
    directory.drop_old(tmp_path, newest, keep=1, keep_best=2, best_by="exam/accuracy")
    assert _steps(tmp_path) == [1, 4, 5]


def test_nothing_goes_when_all_are_to_be_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _checkpoint(tmp_path, step)
    directory.drop_old(tmp_path, tmp_path / directory.step_name(3), keep=0, keep_best=0)
    assert _steps(tmp_path) == [1, 2, 3]


def test_one_that_cannot_be_removed_is_told_and_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        _checkpoint(tmp_path, step)
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name == directory.step_name(1):
            raise PermissionError(f"{source}: in use")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    newest = tmp_path / directory.step_name(3)
    told = directory.drop_old(tmp_path, newest, keep=1, keep_best=0)
    assert told == [f"PermissionError: {tmp_path / directory.step_name(1)}: in use"]
    assert _steps(tmp_path) == [1, 3]


def test_a_link_to_a_checkpoint_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    root = tmp_path / "run"
    moved = _checkpoint(tmp_path / "other disk", 1)
    for name in (directory.step_name(1), directory.step_name(2), ".leaving_step_00000000_ab"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to(moved, target_is_directory=True)
    growing = root / directory.growing_name(2)
    growing.mkdir()
    directory.publish(growing, root / directory.step_name(2))
    assert not directory.drop_old(root, root / directory.step_name(2), keep=1, keep_best=0)
    assert directory.clean(root) == [".leaving_step_00000000_ab"]
    assert sorted(entry.name for entry in root.iterdir()) == ["latest", directory.step_name(2)]
    assert not (root / directory.step_name(2)).is_symlink() and (moved / "state.json").exists()


def test_a_run_that_went_back_keeps_what_it_has_just_written(tmp_path: Path) -> None:
    for step in (100, 200, 800, 900):
        _checkpoint(tmp_path, step)
    directory.drop_old(tmp_path, tmp_path / directory.step_name(200), keep=1, keep_best=0)
    assert _steps(tmp_path) == [200, 800, 900]


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = _checkpoint(tmp_path, 100)
    (tmp_path / "latest").write_text("step_00000100\n")
    (tmp_path / ".latest").write_text("step_0000")
    (tmp_path / ".exported.json.partial").write_text("{")
    for name in (".growing_step_00000200_ab", ".leaving_step_00000050_cd"):
        (tmp_path / name / "shards").mkdir(parents=True)
    assert directory.clean(tmp_path) == [
        ".exported.json.partial",
        ".growing_step_00000200_ab",
        ".latest",
        ".leaving_step_00000050_cd",
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", kept.name]
