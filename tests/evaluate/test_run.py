"""The run that measures a checkpoint takes its model, and none of its settings of training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse
from megavlm.config.schema import Ema, Eval
from megavlm.evaluate.run import _options

EXPERTS = (
    *("--model", "internvl3_5-30b-a3b", "--parallel.expert_model_parallel_size", "8"),
    *("--experts.dispatcher", "allgather", "--experts.balance_loss", "0.1"),
)


def test_settings_of_trained_experts_do_not_stand_in_the_way(tmp_path: Path) -> None:
    trained = parse(["--stage", "2", *EXPERTS])
    assert not [told for told in problems(trained, 8) if "experts" in told]
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    measuring = parse(_options(saved, Eval(), tmp_path))
    assert not [told for told in problems(measuring, 1) if "experts" in told]
    assert measuring.architecture == trained.architecture


def test_averages_do_not_stand_in_the_way(tmp_path: Path) -> None:
    settings = ["--ema.decay", "0.999", "--ema.export", "true", "--ema.evaluate", "true"]
    folders = ["--checkpoint.export_hf", str(tmp_path / "hf"), "--data.valid", "valid"]
    trained = parse(["--stage", "2", "--model", "tiny", *settings, *folders])
    assert not [told for told in problems(trained, 1) if "ema" in told]
    saved = SimpleNamespace(config=trained, folder=tmp_path / "step_00000001")
    measuring = parse(_options(saved, Eval(), tmp_path))
    assert not [told for told in problems(measuring, 1) if "ema" in told]
    assert measuring.ema == Ema()
