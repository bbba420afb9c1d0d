"""What a run says of itself before its first step."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

import megavlm.train
from megavlm.config.cli import parse
from megavlm.config.freeze_mask import PARTS
from megavlm.train.summary import log_run_summary

OF_TRAINING = (
    "moments: fresh",
    "trainable parameters: ",
    "parameter groups:",
    "to save a checkpoint",
)


@pytest.mark.parametrize(("only", "valid"), [(False, ""), (True, ""), (True, "packs")])
def test_an_evaluation_says_nothing_of_training(
    only: bool, valid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavlm.train.summary.raised_on_all", contextlib.nullcontext)
    monkeypatch.setattr("os.cpu_count", lambda: 64)  # of which a scheduler gave it six
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options = ["--save", "run", "--eval.only", str(only).lower(), "--training.steps", "7"]
    config = parse(["--stage", "2", "--model", "tiny", *options, "--data.valid", valid])
    monkeypatch.setattr("megavlm.job_checks._datasets", lambda config: ())  # the packs are nowhere
    said: list[str] = []
    recorded: list[dict] = []
    log_run_summary(
        config,
        SimpleNamespace(
            size=1, tensor_size=1, context_size=1, pipeline_size=1, data_size=1, is_writer=True
        ),
        SimpleNamespace(weights=dict.fromkeys(PARTS, 3), total=dict.fromkeys(PARTS, 4)),
        None,
        SimpleNamespace(step=0, history=()),
        SimpleNamespace(log=said.append, record=lambda step, figures: recorded.append(figures)),
    )
    assert said[0].startswith("stage 2, model tiny, 1 rank: tensor 1") and "start: " in said[1]
    for words in OF_TRAINING:
        assert any(line.startswith(words) for line in said) != only, said
    assert len(recorded) == (not only)
    warning = "warning: --training.steps 7 has no effect with --eval.only true"
    assert any(line.startswith(warning) for line in said) == only, said
    told = [line for line in said if "more than its" in line]
    # Without validation packs an evaluation has no loaders.
    assert bool(told) == (not only or bool(valid)), said
    assert all("2 x 4, more than its 6 cores; give at most --data.workers 3" in t for t in told)


def test_torch_says_nothing_of_many_workers() -> None:
    """Each loader of each rank would, at each evaluation."""
    with warnings.catch_warnings(record=True) as told:
        importlib.reload(megavlm.train)
        DataLoader(range(2), num_workers=10_000)
    assert not told
