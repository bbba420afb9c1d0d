"""What saving does if the save folder is not as the run left it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.checkpoint import checksums, directory, step_folder, train_state
from megavlm.checkpoint.lock import FILE_NAME, Lock, held
from megavlm.checkpoint.train_state import State
from megavlm.config.schema import Checkpoint
from megavlm.train.saver import Saver
from tests.ranks.runs import config_for

OF_PACKS = ("manifest.json", "tokenizer/tokenizer.json")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no rank hear of others; there is no process group."""
    monkeypatch.setattr("megavlm.train.saver.raised_on_all", contextlib.nullcontext)


def _saver(folder: Path, told: list[str], lock: Lock | None = None, step: int = 0) -> Saver:
    config = dataclasses.replace(
        config_for(folder), checkpoint=Checkpoint(save=str(folder), keep=1)
    )
    packs = folder.parent / "packs"
    (packs / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in OF_PACKS:
        (packs / name).write_text(name)
    job = SimpleNamespace(
        config=config,
        lock=lock,
        groups=SimpleNamespace(rank=0),
        train=SimpleNamespace(folder=packs),
        unused_weights={},
        usage=None,
    )
    return Saver(job, SimpleNamespace(log=told.append, log_own=told.append), step)


def _checkpoint(folder: Path, step: int) -> Path:
    made = folder / directory.step_name(step)
    made.mkdir(parents=True)
    train_state.write(State(step=step), made)
    (folder / "latest").write_text(made.name + "\n")
    return made


@pytest.mark.parametrize("is_all", [True, False])
def test_a_lock_that_somebody_removed_is_made_again(tmp_path: Path, is_all: bool) -> None:
    folder = tmp_path / "run"
    told: list[str] = []
    with held(folder) as lock:
        saver = _saver(folder, told, lock, step=3)
        _checkpoint(folder, 3)
        if is_all:
            shutil.rmtree(folder)
        else:
            (folder / FILE_NAME).unlink()
        saver._check_lock()
        lock.check()
        saver._check_lock()
    assert len(told) == 1 and f"--checkpoint.save {folder}: somebody removed" in told[0]


def test_a_run_that_slept_while_another_saved_does_not_take_its_lock_again(tmp_path: Path) -> None:
    with held(tmp_path) as lock:
        saver = _saver(tmp_path, [], lock, step=3)
        (tmp_path / FILE_NAME).unlink()
        _checkpoint(tmp_path, 4)
        with pytest.raises(OSError, match="is gone"):
            saver._check_lock()


@pytest.mark.parametrize(("module", "name"), [(os, "replace"), (Path, "glob")])
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    old = _checkpoint(tmp_path, 1)
    newest = _checkpoint(tmp_path, 2)

    def refuse(*paths: Path, **options: object) -> None:
        raise PermissionError("in use")

    told: list[str] = []
    saver = _saver(tmp_path, told)
    monkeypatch.setattr(module, name, refuse)
    saver._drop_old(newest)
    assert old.exists() and len(told) == 1
    assert told[0].startswith("WARNING: --checkpoint.keep 1:") and "in use" in told[0]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_checkpoint_holds_the_manifest_and_the_tokenizer_that_the_run_began_with(
    tmp_path: Path, is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "latin-1")
    run = tmp_path / "Übung"  # and a machine whose locale is not UTF-8
    saver = _saver(run, [])
    shutil.rmtree(tmp_path / "packs")
    if not is_gone:
        (tmp_path / "packs" / "tokenizer").mkdir(parents=True)
        (tmp_path / "packs" / "manifest.json").write_text("{")
    saver._state = State(step=3)
    saver._growing = run / directory.growing_name(3)
    saver._growing.mkdir(parents=True)
    saver._publish({})
    made = step_folder.read(run / "step_00000003")
    assert made.config.checkpoint.save == str(run)
    assert checksums.read(made.folder).keys() == {"config.yaml", "state.json", *OF_PACKS}
    assert [(made.folder / name).read_text() for name in OF_PACKS] == [*OF_PACKS]
