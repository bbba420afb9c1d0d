"""What ends a run is told in words if it is no mistake in the code."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.checkpoint.train_state import State
from megavlm.config.schema import Checkpoint, Config
from megavlm.data.loading.loader import WorkerError
from megavlm.io.remote import RemoteError
from megavlm.io.storage import ReadError
from megavlm.train import export, failures
from megavlm.train.saver import SaveError
from tests.ranks.runs import config_for


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return config_for(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ReadError("packs-00000.bin: ends inside pack 7"),
        RemoteError("s3://bucket/packs: no answer"),
        WorkerError("a worker was killed by signal 9"),
        RuntimeError("Connection closed by peer [127.0.0.1]:7883"),
        OSError(errno.ENOSPC, "No space left on device", "/runs/exported"),
    ],
)
def test_what_a_machine_did_to_one_rank_names_the_rank(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    assert failures.report(config, error) == 1
    told = capsys.readouterr().err
    assert told.startswith("error on rank 3 (") and str(error) in told
    assert str(error) in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_an_evaluation_that_ends_has_no_checkpoint_to_resume_from(
    config: Config, capsys: pytest.CaptureFixture
) -> None:
    config = dataclasses.replace(config, checkpoint=Checkpoint(save="runs/a"))
    for evaluation, resumes in (
        (config.eval, True),
        (dataclasses.replace(config.eval, only=True), False),
    ):
        failures.report(dataclasses.replace(config, eval=evaluation), ReadError("cut off"))
        assert ("the last checkpoint in runs/a" in capsys.readouterr().err) == resumes


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("exports/a: exists and is not an empty folder"),
    ],
)
def test_an_export_that_fails_leaves_the_way_to_export_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    files = Checkpoint(save="runs/a", export_hf="exports/a")
    config = dataclasses.replace(config, checkpoint=files)

    def fail(*_: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(export.convert, "export", fail)
    done = State(step=config.training.steps)
    with pytest.raises(export.ExportError) as failed:
        export.export_finished(config, done, None, SimpleNamespace(rank=0))
    assert failures.report(config, failed.value) == 1
    told = capsys.readouterr().err
    assert "--checkpoint.export_hf exports/a: the model could not be exported" in told
    assert told.count("same command") == 1, told


def test_what_every_rank_knows_is_told_by_the_first(
    config: Config, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures.report(config, SaveError("no room")) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert failures.report(config, SaveError("no room")) == 2
    assert capsys.readouterr().err == "error: no room\n"


@pytest.mark.parametrize("error", [ValueError("shapes differ"), OSError(errno.EPIPE, "broken")])
def test_a_mistake_in_the_code_keeps_its_traceback(
    config: Config, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    assert failures.report(config, error) is None
    assert capsys.readouterr().err == ""
