"""What other trainers call otherwise is answered with its name here."""

from __future__ import annotations

import re

import pytest

from megavlm.config.cli import parse
from megavlm.config.not_offered import OF_OTHER_TRAINERS
from megavlm.config.options import ALIASES, options


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--learning_rate", "--learning_rate; here it is --optimizer.lr\n"),
        ("--max-grad-norm", "--max-grad-norm; here it is --optimizer.clip_grad\n"),
        ("--training.epochs", "epochs; here it is --training.steps, optimizer steps of --training"),
    ],
)
def test_names_of_other_trainers(flag: str, told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--stage", "1", "--model", "tiny", flag, "1"])
    assert told in capsys.readouterr().err


def test_what_is_told_exists() -> None:
    told = " ".join(OF_OTHER_TRAINERS.values())
    assert set(re.findall(r"--([a-z_.]+)", told)) <= options().keys()
    assert not OF_OTHER_TRAINERS.keys() & {flag.lstrip("-") for flag in ALIASES}
