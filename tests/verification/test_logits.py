"""The verdict on an export: it can be no as well as yes."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megavlm.config.recipes import recipe
from tools.verification.agreement import Agreement
from tools.verification.logits import _refuse_others, _Tally, spread

TOOL = Path(__file__).parents[2] / "tools" / "verify_export.py"
SAME = Agreement(
    samples=2,
    tokens=30,
    max_abs_difference=2e-6,
    largest_logit=8.0,
    equal_choices=30,
    not_finite=0,
    dtype="float32",
    checkpoint="runs/stage2/step_00000300",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"max_abs_difference": 7e-4}, None),  # 1e-4 of the largest logit is 8e-4
        ({"max_abs_difference": 9e-4}, "logits differ by up to 9.00e-04, limit 8.00e-04"),
        ({"max_abs_difference": float("nan")}, "logits differ"),
        ({"not_finite": 1}, "1 of 30 positions have NaN"),
        ({"tokens": 0, "samples": 0}, "no position"),
        ({"max_abs_difference": 0.3, "dtype": "bfloat16"}, None),
        ({"max_abs_difference": 0.5, "dtype": "bfloat16"}, "may do that: compare in float32"),
    ],
)
def test_the_verdict(changes: dict, message: str | None, capsys: pytest.CaptureFixture) -> None:
    found = dataclasses.replace(SAME, **changes)
    report = runpy.run_path(str(TOOL))["report"]
    assert report(found, None) == (0 if message is None else 1)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "checkpoint: runs/stage2/step_00000300"
    assert last.startswith("PASS" if message is None else "FAIL") and (message or "") in last


def test_positions_that_are_not_finite_are_counted_and_not_compared() -> None:
    tally = _Tally()
    ours = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [5.0, 6.0]])
    theirs = torch.tensor([[1.0, 2.5], [3.0, 4.0], [7.0, float("inf")]])
    tally.add(ours, theirs)
    assert (tally.tokens, tally.not_finite, tally.equal) == (3, 2, 1)
    assert (tally.largest, tally.largest_logit) == (0.5, 2.0)
    tally.add(ours * float("nan"), theirs)
    assert (tally.samples, tally.not_finite, tally.largest) == (2, 5, 0.5)


def test_packs_are_spread_over_all_of_them() -> None:
    assert spread(10, 4) == [1, 3, 6, 8]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(5, 1) == [2] and spread(0, 4) == []


def test_no_packs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    options = ["--load", folder, "--hf", folder, "--data", folder, "--packs", "0"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == 2
    assert "argument --packs: 0: must be at least 1" in capsys.readouterr().err


def test_models_of_pairs_have_nothing_to_compare(tmp_path: Path) -> None:
    config = SimpleNamespace(architecture=recipe("clip").architecture)
    found = SimpleNamespace(config=config, folder=tmp_path)
    with pytest.raises(ValueError, match="a model of pairs has no logits"):
        _refuse_others(found, tmp_path, None)
