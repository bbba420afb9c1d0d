"""Cross checks of where checkpoints go and come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavlm.config.checks.saving import checkpoint_problems
from megavlm.config.schema import Checkpoint


def test_weights_alone_need_a_checkpoint_and_leave_moments_out(tmp_path: Path):
    def problems(**settings) -> list[str]:
        checkpoint = Checkpoint(save="run", weights_only=True, **settings)
        return list(checkpoint_problems(checkpoint, eval_interval=0, steps=10, averages=False))

    assert problems(load=str(tmp_path)) == []
    [missing] = problems()
    assert missing.startswith("--checkpoint.weights_only needs --checkpoint.load")
    [both] = problems(load=str(tmp_path), moments="keep")
    assert "weights_only and --checkpoint.moments keep exclude each other" in both


def test_a_place_that_cannot_be_written_to_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def problems(**settings: object) -> list[str]:
        checkpoint = Checkpoint(**settings)
        return list(checkpoint_problems(checkpoint, eval_interval=0, steps=10, averages=False))

    good = str(tmp_path / "made" / "run")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/run/1", "link"):
        bad = str(tmp_path / name)
        for flag, settings in (
            ("save", dict(save=bad)),
            ("export_hf", dict(save=good, export_hf=bad)),
        ):
            [found] = problems(**settings)
            assert found.startswith(f"--checkpoint.{flag} {bad}: ") and "is a file" in found
    assert problems(save=good, export_hf=str(tmp_path / "export")) == []
    # As on a file system that is mounted read-only; the tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = problems(save=good, export_hf=str(tmp_path / "export"))
    assert [f"nothing can be written in {tmp_path};" in line for line in found] == [True, True]
    monkeypatch.setenv("RANK", "1")  # has no part in the export
    assert len(problems(save=good, export_hf=str(tmp_path / "export"))) == 1
