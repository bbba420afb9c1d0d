"""Packed datasets against the model and against each other, and all problems together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.checks.data import data_problems
from megavlm.config.checks.datasets import batch_warnings
from megavlm.config.checks.rules import ConfigError, check, facts_problems
from megavlm.config.cli import parse
from megavlm.config.evaluation import Eval
from megavlm.config.objectives import OBJECTIVES
from tests.config.checks.configs import facts, tiny


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"num_packs": 0}, "", ["--data.train packs: has no packs"]),
        ({"image_size": 448}, "", ["tiles of 448 pixels", "image_size is 32"]),
        (
            {"features_per_tile": 256},
            "",
            ["packed for 256 features a tile, but the model makes 16; train the model that"],
        ),
        ({"vocab_size": 600}, "", ["has 600 tokens", "vocab_size is 512"]),
        (
            {"tiling": "anyres"},
            "",
            ["packed with --tiling anyres, which needs --architecture.connector.newline true"],
        ),
        (
            {"capacity": 1023},
            "--tensor-model-parallel-size 2 --sequence-parallel",
            ["packs of 1023 tokens", "parallel_size 2"],
        ),
        (
            {"alignment": 6},
            "--context-parallel-size 2",
            ["multiples of 6", "context_parallel_size 2", "with --alignment 4"],
        ),
        (
            {"capacity": 1000},
            "--fp8.language tensorwise",
            ["packs of 1000 tokens give a rank 1000 rows", "a multiple of 16; pack with"],
        ),
        (
            {"capacity": 1072},
            "--fp8.language mxfp8 --tensor-model-parallel-size 2 --sequence-parallel",
            ["give a rank 536 rows", "a multiple of 32"],
        ),
        (
            {"resample": "bicubic"},
            "--architecture.vision.resample bilinear",
            ["its images are resized bicubic", "pack with --resample bilinear"],
        ),
        (
            {"has_images": False},
            "--training.trainable vision,connector",
            ["has no images", "learns from images only"],
        ),
    ],
)
def test_packs_that_do_not_fit_the_model_are_refused(
    changes: dict[str, Any], options: str, words: list[str], packs: Path
):
    config = tiny(packs, *options.split())
    found = facts_problems(config, [facts(config, **changes)], 1)
    assert len(found) == 1 and all(word in found[0] for word in words), found


def test_packs_of_preferences_are_for_objectives_of_preferences(
    packs: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(packs)
    kinds = [facts(config, preferences=True), facts(config, flag="--data.valid")]
    (told,) = facts_problems(config, kinds, 1)
    assert told.startswith("--data.train packs: packed with --preferences, each answer beside a")
    # What is only evaluated takes template and tokenizer of them.
    only = dataclasses.replace(config, eval=Eval(only=True))
    assert facts_problems(only, kinds[:1], 1) == []
    needs = dataclasses.replace(config.architecture.needs, is_of_preferences=True)
    monkeypatch.setitem(OBJECTIVES, "next_token", needs)
    (told,) = facts_problems(config, kinds, 1)
    assert told.startswith("--data.valid packs: has no rejected answers, which --architecture.obj")


def test_packs_without_images_need_not_fit_the_vision_encoder(packs: Path):
    config = tiny(packs, stage="0")
    assert (
        facts_problems(
            config, [facts(config, has_images=False, image_size=448, features_per_tile=256)], 1
        )
        == []
    )


def test_packs_for_another_normalisation_are_refused(packs: Path):
    config = tiny(packs)
    nearly = tuple(value * (1 + 1e-7) for value in config.architecture.vision.pixel_mean)
    assert not facts_problems(config, [facts(config, pixel_mean=nearly)], 1)
    [problem] = facts_problems(config, [facts(config, pixel_mean=(0.5, 0.5, 0.5))], 1)
    assert (
        "--data.train" in problem
        and "pixel_mean" in problem
        and "0.5" in problem
        and "0.485" in problem
    )


def test_training_and_held_out_packs_share_a_tokenizer(packs: Path):
    config = tiny(packs)
    other = facts(config, flag="--data.valid", folder="held-out", fingerprint="xyz")
    assert facts_problems(config, [facts(config), other], 1) == [
        "--data.valid held-out: packed with another tokenizer than --data.train packs"
    ]


def test_all_problems_come_in_one_message(packs: Path):
    config = tiny(packs, "--lr", "0", "--training.steps", "0", "--global-batch-size", "3")
    with pytest.raises(ConfigError) as refused:
        check(config, 2, [facts(config, num_packs=0)])
    lines = str(refused.value).splitlines()
    assert lines[0] == "4 problems with the configuration:" and len(lines) == 5
    assert [line.split()[0] for line in lines[1:]] == [
        "--training.global_batch_size",
        "--training.steps",
        "--optimizer.lr",
        "--data.train",
    ]


def test_augmentation_that_would_change_nothing_is_told(packs: Path):
    config = tiny(packs, "--data.augment", "jpeg,flip")
    [problem] = facts_problems(config, [facts(config)], 1)
    assert "--data.augment jpeg,flip has no effect" in problem and "--data_augment" in problem
    assert not facts_problems(config, [facts(config, may_augment=True)], 1)


def test_a_curriculum_needs_levels(packs: Path):
    config = tiny(packs, "--data.curriculum", "true")
    [problem] = facts_problems(
        config, [facts(config), facts(config, flag="--data.valid", has_levels=True)], 1
    )
    assert problem.startswith("--data.curriculum true: ") and "--difficulty" in problem
    assert not facts_problems(config, [facts(config, has_levels=True)], 1)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [("", "a has a share of 0.8"), ("--data.weights 1,19", None), ("--data.weights 1,30", "a ")],
)
def test_shares_of_a_batch_are_a_pack_at_least(packs: Path, options: str, wrong: str | None):
    folders = [
        "--data.train",
        f"{packs},{packs}",
        "--data.batch_shares",
        "true",
        "--training.global_batch_size",
        "20",
    ]
    config = tiny(packs, *folders, *options.split())
    problems = facts_problems(
        config, [facts(config, folder="a", num_packs=4), facts(config, folder="b", num_packs=96)], 1
    )
    assert len(problems) == (wrong is not None)
    assert wrong is None or (
        wrong in problems[0] and "--training.global_batch_size 20" in problems[0]
    )


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ("", "--data.train a: has a share of 5e-07 of"),
        ("--data.weights 1,1", None),
        ("--data.weights 1e9,1", "--data.train b: has a share of 1e-09 of"),
        ("--data.weights 1e9,0", "--data.weights 1000000000.0,0.0: each must be above 0"),
        ("--data.weights 1e9,1,1", "--data.weights: 3 weights for 2 folders"),
    ],
)
def test_a_folder_that_no_pack_would_be_drawn_from_is_told(
    packs: Path, options: str, wrong: str | None
):
    config = tiny(packs, "--data.train", f"{packs},{packs}", *options.split())
    sizes = {"a": 4, "b": 8_000_000}
    sets = [facts(config, folder=name, num_packs=number) for name, number in sizes.items()]
    problems = [*facts_problems(config, sets, 1), *data_problems(config.data)]
    assert len(problems) == (wrong is not None)
    assert wrong is None or problems[0].startswith(wrong)


def test_a_share_of_a_pack_to_the_last_digit_is_one(packs: Path):
    """As floats these weights give the first dataset 0.9999999999999999 packs."""
    folders = ["--data.train", f"{packs},{packs},{packs}", "--data.weights", "0.3,0.7,2"]
    batch = ["--data.batch_shares", "true", "--training.global_batch_size", "10"]
    config = tiny(packs, *folders, *batch)
    assert not facts_problems(config, [facts(config, num_packs=9) for _ in range(3)], 1)


@pytest.mark.parametrize(
    ("packed", "options", "warned"),
    [
        ([3], "--training.global_batch_size 4", ["packs: has 3 packs, and a step of"]),
        ([1], "--training.global_batch_size 4", ["packs: has 1 pack, and a step of"]),
        ([4], "--training.global_batch_size 4", []),
        ([4, 96], "--training.global_batch_size 20", []),
        ([4, 96], "--training.global_batch_size 20 --data.weights 1,1", ["draws 10 from it"]),
        ([4, 5], "--training.global_batch_size 20", ["draws 8.889 from it", "draws 11.11"]),
    ],
)
def test_a_step_of_more_packs_than_there_are_is_warned_of(
    packs: Path, packed: list[int], options: str, warned: list[str]
):
    config = tiny(packs, "--data.train", ",".join([str(packs)] * len(packed)), *options.split())
    sets = [facts(config, num_packs=number) for number in packed]
    valid = facts(config, flag="--data.valid", num_packs=1)
    found = list(batch_warnings(config, [*sets, valid]))
    assert len(found) == len(warned), found
    assert all(words in warning for words, warning in zip(warned, found, strict=True)), found


@pytest.mark.parametrize(
    ("batch", "samples", "objective", "is_warned"),
    [
        (1, 9, "contrastive", True),
        (1, 9, "next_token", False),
        (2, 9, "contrastive", False),
        (1, 10, "contrastive", False),
    ],
)
def test_a_step_of_one_pair_is_warned_of(
    packs: Path, batch: int, samples: int, objective: str, is_warned: bool
):
    options = ["--training.global_batch_size", str(batch), "--architecture.objective", objective]
    config = tiny(packs, *options)
    found = list(batch_warnings(config, [facts(config, num_packs=9, num_samples=samples)]))
    assert ["a step has one pair" in warning for warning in found] == [True] * is_warned


@pytest.mark.parametrize(
    ("ranks", "measured", "objective", "more"),
    [
        (10, 0, "contrastive", None),
        (11, 0, "contrastive", "packs"),
        (8, 7, "contrastive", "--training.eval_packs"),
        (11, 0, "next_token", None),
    ],
)
def test_every_rank_has_a_validation_pack_if_a_loss_depends_on_the_step(
    packs: Path, ranks: int, measured: int, objective: str, more: str | None
):
    options = ["--architecture.objective", objective, "--training.eval_packs", str(measured)]
    config = tiny(packs, *options, "--tensor-model-parallel-size", "2")
    sets = [facts(config, num_packs=1), facts(config, flag="--data.valid")]
    found = [one for one in facts_problems(config, sets, 2 * ranks) if "are measured" in one]
    assert len(found) == (more is not None)
    assert all(f"the {ranks} data-parallel ranks; use more {more}" in one for one in found), found


def test_blended_packs_have_one_capacity(packs: Path):
    config = tiny(packs)
    [problem] = facts_problems(
        config, [facts(config), facts(config, folder="other", capacity=512)], 1
    )
    assert "--data.train other: packs of 512 tokens, but those of packs have 1024" in problem


@pytest.mark.parametrize("positions", [50, 128])
def test_longer_instructions_are_proposed_if_there_are_positions_for_them(positions: int) -> None:
    settings = {"instruction_tokens": 50, "max_position_embeddings": positions}
    flag = "--architecture.connector.qformer."
    options = [word for name, value in settings.items() for word in (flag + name, str(value))]
    config = parse(["--recipe", "instructblip", "--stage", "1", *options])
    found = facts(config, instruction_length=128, tiling="stretch")
    [problem] = [
        one for one in facts_problems(config, [found], 1) if "instruction_length 128" in one
    ]
    assert (f"give {flag}instruction_tokens 128" in problem) == (positions == 128)
