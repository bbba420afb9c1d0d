"""The planner's command for a run that is out of memory asks for that very run."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from megavlm.config.cli import parse
from megavlm.config.schema import Config
from megavlm.health.out_of_memory import advice
from tools.planning.options import make_parser, read_config

NAMES = ["--stage", "2", "--model", "internvl2_5-1b", "--data.train", "packs"]
SETTINGS = {
    "plain": "",
    "adapters": "--architecture.lora.rank 8 --training.trainable connector --training.drop_path 0",
    "optimizer": "--optimizer.moments bfloat16 --lr 3e-5",
    "FP8": "--ema.decay 0.999 --fp8.language tensorwise --loss.vocabulary_block 8192",
    "layout": "--tensor-model-parallel-size 2 --sequence-parallel --parallel.vision data"
    " --parallel.recompute full --parallel.recompute_parts vision --global-batch-size 96",
    "pipeline": "--pipeline-model-parallel-size 2 --parallel.layout 'v*24|c,t*24,h'",
    "ranges": "--training.trainable language.layers.-2: --training.drop_path 0",
}


def asked(config: Config) -> Config:
    """Return the run that the planner's command asks about."""
    *_, command = advice(config, 8, MemoryError()).splitlines()
    python, tool, *words = shlex.split(command)
    assert (python, tool) == ("python", "tools/plan_parallel.py")
    options, others = make_parser("").parse_known_args(words)
    assert (options.gpus, str(options.data)) == (8, "packs")
    return read_config(options, others)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_planner_is_asked_about_the_same_run(settings: str):
    config = parse([*NAMES, *shlex.split(settings)])
    planned = asked(config)
    assert planned == dataclasses.replace(config, data=planned.data)


def test_a_model_that_nobody_else_can_read_has_no_command():
    config = dataclasses.replace(parse(NAMES), model="gone/folder")
    assert "plan_parallel" not in advice(config, 8, MemoryError())
