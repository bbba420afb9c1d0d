"""YAML files of settings: what is said twice or left out is an error with its lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavlm.config.cli import parse

NAMES = ["--stage", "1", "--model", "tiny"]
WRONG = {
    "a key given twice": (
        "training:\n  steps: 3\n  seed: 1\n  steps: 4\n",
        "lines 2 and 4: training.steps is given 2 times",
    ),
    "a section given twice": (
        "training:\n  steps: 3\ndata:\n  workers: 1\ntraining:\n  seed: 4\n",
        "lines 1 and 5: training is given 2 times",
    ),
    "a key given as a path and inside its section": (
        "training.steps: 3\ntraining:\n  steps: 4\n",
        "lines 1 and 3: training.steps is given 2 times",
    ),
    "no value": (
        "training:\n  seed: 1\n  steps:\n",
        "line 3: training.steps has no value; give one (an integer)",
    ),
    "null": ("training: {steps: null}\n", "line 1: training.steps has no value"),
    "null for a name": ("stage:\n", "line 1: stage has no value"),
    "an empty section": ("data: {workers: 1}\ntraining:\n", "line 2: the section training is"),
    "an empty mapping": ("training: {}\n", "line 1: the section training is empty"),
    "a number for a section": ("\ntraining: 7\n", "line 2: unknown key training (a section"),
    "an unknown key": ("training:\n  steps: 3\n  sede: 4\n", "line 3: unknown key training.sede"),
    "a wrong kind": ("training:\n  seed: 1\n  steps: many\n", "line 3: --training.steps: expected"),
    "a list for a number": ("training:\n  steps: [1]\n", "line 2: --training.steps: expected"),
    "a key that is no text": ("3: 4\n", "line 1: unknown key 3"),
    "a mapping that holds itself": ("training: &a\n  steps: *a\n", "not YAML"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("text", "told"), WRONG.values(), ids=list(WRONG))
def test_each_mistake_is_told_with_file_and_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused([*NAMES, "--config", str(path)], capsys)
    assert f"--config {path}" in message and told in message, message
    assert "Traceback" not in message and message.count("\n") <= 3


def test_every_mistake_of_a_file_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {steps: 3, steps: 4}\ninit:\nsede: 5\n")
    message = refused([*NAMES, "--config", str(path)], capsys)
    assert all(words in message for words in ("given 2 times", "init is empty", "key sede"))


def test_a_folder_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = refused([*NAMES, "--config", str(tmp_path)], capsys)
    assert f"--config {tmp_path}: is a folder; name a YAML file" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.touch(mode=0o000)
    assert "cannot be read (Permission denied)" in refused([*NAMES, "--config", str(path)], capsys)


def test_an_empty_text_on_the_command_line_wins_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("init: {vision: nowhere}\n")
    assert parse([*NAMES, "--config", str(path)]).init.vision == "nowhere"
    assert parse([*NAMES, "--config", str(path), "--init.vision", ""]).init.vision == ""
    assert parse([*NAMES, "--config", str(path), "--init.vision="]).init.vision == ""


def test_a_key_of_its_own_wins_over_one_that_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {<<: {steps: 3, seed: 5}, steps: 4}\n")
    training = parse([*NAMES, "--config", str(path)]).training
    assert (training.steps, training.seed) == (4, 5)
