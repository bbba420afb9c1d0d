"""Options drawn at random, for every recipe: what the checks accept trains, another layout trains
alike, and a run goes on bit for bit. ``MEGAVLM_MATRIX=all`` draws many more.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from megavlm.config.cli import to_yaml
from megavlm.config.options import Option, options
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Config
from megavlm.config.vision import PIXELS
from megavlm.job_checks import problems
from tests.config.test_cli import with_value
from tests.ranks import commands
from tests.ranks.layouts import asks_for_all
from tests.ranks.test_recipes import CASES

SEEDS = range(300 if asks_for_all() else 3)
# What is drawn, but for what decides where a run stands and what it prints, and for rates with
# which rounding grows.
SECTIONS = ("architecture.lora.", "optimizer.", "training.", "loss.", "ema.", "experts.", "data.")
LEFT_OUT = (
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup_init_lr",
    "optimizer.adam_",
    "optimizer.sgd_",
    "optimizer.muon_",
    "architecture.lora.alpha",
    "training.steps",
    "training.precision",
    "training.global_batch_size",
    "training.eval_",
    "training.max_hours",
    "data.train",
    "data.valid",
    "data.packing",
    "data.cache",
    "data.template",
    "data.tiling",
    "data.timeout",
    "data.max_unreadable_packs",
)
DRAWN = tuple(
    option
    for option in options().values()
    if option.key.startswith(SECTIONS) and not option.key.startswith(LEFT_OUT)
)
PATTERNS = ("vision", "language", "connector", "language.*", "*.bias", "language=0.5", "vision=1")
# What has to be given together.
TOGETHER: tuple[dict[str, Any], ...] = (
    {},
    {"architecture.lora.rank": 4, "training.trainable": ("connector", "language.*.lora")},
    {"training.drop_path": 0.2, "ema.decay": 0.9},
    {"optimizer.kind": "muon", "loss.vocabulary_block": 64},
    {"training.frozen_until": ("connector=2",), "data.workers": 2},
)
LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, dict(recompute="selective")),
    (1, dict(recompute="full")),
    (2, {}),
    (2, dict(tensor_model_parallel_size=2)),
    (2, dict(tensor_model_parallel_size=2, sequence_parallel=True, recompute="selective")),
    (2, dict(tensor_model_parallel_size=2, vision="data")),
    (2, dict(pipeline_model_parallel_size=2, layout="even")),
    (2, dict(context_parallel_size=2, recompute="full")),
    (2, dict(expert_model_parallel_size=2)),
    (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="even")),
)
COMPARED = re.compile(r"loss|grad_norm|param_norm|lr")
STEPS = 3


def draw(option: Option, rng: random.Random) -> Any:
    """Return a value that an option may have."""
    kind = option.kind
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if get_origin(kind) is tuple:
        several = {str: PATTERNS, int: (0, 1, 2), float: (0.0, 0.5, 1.0)}[get_args(kind)[0]]
        return tuple(rng.sample(several, rng.randint(1, 2)))
    simple = {bool: (True, False), int: (0, 1, 2, 4, 16), float: (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)}
    return rng.choice(simple.get(kind, PATTERNS))


def changed(config: Config, values: dict[str, Any]) -> Config:
    """Return a configuration with other values of some options."""
    for key, value in values.items():
        config = with_value(config, key, value)
    return config


def accepted(config: Config, ranks: int, drawn: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Leave out what the checks name, or else what is in a section that they name, until there is
    nothing to refuse; return the run, and what is left.
    """
    while True:
        run = changed(config, drawn)
        found = problems(run, ranks)
        if not found:
            return run, drawn
        named = set(re.findall(r"--([a-z_0-9.]+)", "\n".join(found)))
        sections = {key.rpartition(".")[0] for key in named}
        left_out = named & drawn.keys() or {
            key for key in drawn if key.rpartition(".")[0] in sections
        }
        assert left_out, found
        drawn = {key: value for key, value in drawn.items() if key not in left_out}


def train(config: Config, ranks: int, folder: Path) -> list[dict[str, float]]:
    """Run ``pretrain_vlm.py`` on so many ranks; return the figures of each step that are compared.
    Checkpoints of all steps are kept in ``folder``.
    """
    run = changed(config, {"checkpoint.save": str(folder)})
    settings = folder.with_name(f"{folder.name}.yaml")
    settings.write_text(to_yaml(run))
    done = commands.run([["--config", str(settings)]] * ranks, folder.with_name("told"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if COMPARED.match(name)}
        for row in rows
        if "loss" in row
    ]


def go_on(config: Config, ranks: int, folder: Path, copy: Path) -> dict[str, float]:
    """Run the last step again, from the checkpoint before it in a copy of ``folder``."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / f"step_{STEPS:08d}")
    (copy / "latest").write_text(f"step_{STEPS - 1:08d}\n")
    return train(config, ranks, copy)[-1]


def assert_alike(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_accepted_trains_alike_at_another_layout_and_goes_on(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    recipe = rng.choice(sorted(CASES))
    base = CASES[recipe](tmp_path / "packs", steps=STEPS, drop_path=0.0)
    mean, std = PIXELS["imagenet"]  # as the packs are normalised
    usual = {"architecture.vision.pixel_mean": mean, "architecture.vision.pixel_std": std}
    usual |= {"checkpoint.save_interval": 1, "checkpoint.keep": 0, "logging.interval": 1}
    usual |= {
        "stage": min(base.stage, max(RECIPES[base.recipe].stages)),
        "optimizer.adam_eps": 1e-3,
    }
    base = changed(base, usual)
    drawn = {option.key: draw(option, rng) for option in rng.sample(DRAWN, rng.randint(1, 8))}
    drawn |= rng.choice(TOGETHER)
    alone = {"checkpoint.save": str(tmp_path / "one")}
    _, drawn = accepted(changed(base, alone), 1, drawn)
    ranks, layout = rng.choice(LAYOUTS)
    layout = {f"parallel.{name}": value for name, value in layout.items()}
    _, layout = accepted(changed(base, alone | drawn), ranks, layout)
    print(f"{recipe}, {drawn}, on {ranks}: {layout}")
    one = changed(base, drawn)
    other = changed(one, layout)

    expected = train(one, 1, tmp_path / "one")
    assert len(expected) == STEPS
    assert_alike(train(other, ranks, tmp_path / "other"), expected)
    assert go_on(one, 1, tmp_path / "one", tmp_path / "again") == expected[-1]
    assert_alike([go_on(other, ranks, tmp_path / "one", tmp_path / "moved")], expected[-1:])
