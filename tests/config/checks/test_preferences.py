"""What a run on preferences refuses, and what other runs refuse of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse
from tests.config.checks.configs import tiny

MPO = "--architecture.preference"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.loss_reduction", "square"], "--data.loss_reduction square: "),
        (["--loss.z_loss", "1e-4"], "--loss.z_loss 0.0001: --architecture.objective preference"),
        (["--loss.label_smoothing", "0.1"], "--loss.label_smoothing 0.1: "),
        (["--data.max_unreadable_packs", "3"], "needs the reference's probabilities of every pack"),
        (["--data.augment", "jpeg"], "--data.augment jpeg: --architecture.objective preference"),
        (["--data.reference", "s3://bucket/of"], "s3://bucket/of: must be a local folder"),
        ([f"{MPO}.beta", "0"], f"{MPO}.beta 0.0: must be above 0"),
        ([f"{MPO}.bco", "-1"], f"{MPO}.bco -1.0: must be 0 or more"),
        (
            [f"{MPO}.dpo", "0", f"{MPO}.bco", "0", f"{MPO}.sft", "0"],
            "nothing would be trained",
        ),
        ([f"{MPO}.label_smoothing", "0.5"], "must be from 0 to below 0.5"),
        ([f"{MPO}.dpo", "0", f"{MPO}.label_smoothing", "0.1"], "has no effect"),
        (
            [
                "--architecture.cross_attention.every",
                "2",
                "--architecture.connector.kind",
                "resampler",
            ],
            "has not been tried with it",
        ),
    ],
)
def test_settings_that_do_not_go_with_preferences(
    tmp_path: Path, options: list[str], words: str
) -> None:
    found = problems(tiny(tmp_path, *options, stage="mpo"), 1)
    assert any(words in one for one in found), found


def test_a_run_that_keeps_nothing_needs_a_folder_for_the_reference(tmp_path: Path) -> None:
    words = ["--stage", "mpo", "--model", "tiny", "--data.train", str(tmp_path)]
    words += ["--checkpoint.save_interval", "0"]
    [found] = problems(parse(words), 1)
    assert "--data.reference: " in found and "or --checkpoint.save" in found
    config = parse([*words, "--data.reference", "of stage 2"])
    assert problems(config, 1) == [] and config.reference == "of stage 2"
    saved = parse([*words, "--checkpoint.save", "runs/mpo"])
    assert problems(saved, 1) == [] and saved.reference == "runs/mpo/reference"
    plain = dataclasses.replace(saved.architecture, objective="next_token")
    assert dataclasses.replace(saved, architecture=plain).reference == ""


@pytest.mark.parametrize(
    "options", [["--data.reference", "of stage 2"], [f"{MPO}.beta", "0.2"], [f"{MPO}.sft", "0.5"]]
)
def test_options_of_preferences_are_told_where_none_are_read(
    tmp_path: Path, options: list[str]
) -> None:
    [found] = problems(tiny(tmp_path, *options), 1)
    assert options[0] in found and "--architecture.objective is next_token" in found
