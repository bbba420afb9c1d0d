"""Commands of several stages, taken apart and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks import rules
from megavlm.config.cli import from_yaml
from megavlm.config.schema import Init
from megavlm.config.stages import parse_stages

COMMON = ["--model", "tiny", "--data.train", "packs", "--save", "runs/all"]


def parsed(*arguments: str, problems: tuple[str, ...] = ()):
    def read(path: Path):
        raise ValueError(f"--model {path}: not read")

    return parse_stages(arguments, read, lambda config, ranks: list(problems))


def test_each_stage_has_a_folder_and_starts_from_the_one_before() -> None:
    runs = parsed(
        *COMMON,
        "--stage=1,1.5,2",
        "--load",
        "start",
        "--for",
        "1.5",
        "--data.train 'other packs' --training.steps=7",
        "--for=2",
        "--optimizer.lr 1e-6",
        "--checkpoint.export_hf",
        "out",
    )
    assert [run.stage for run in runs] == ["1", "1.5", "2"]
    assert [run.checkpoint.save for run in runs] == [
        f"runs/all/stage_{n}" for n in ("1", "1.5", "2")
    ]
    assert [run.checkpoint.load for run in runs] == [
        "start",
        "runs/all/stage_1",
        "runs/all/stage_1.5",
    ]
    assert [run.data.train for run in runs] == ["packs", "other packs", "packs"]
    assert (runs[1].training.steps, runs[2].optimizer.lr) == (7, 1e-6)
    assert [run.training.trainable[0] for run in runs] == ["connector", "vision", "vision"]
    assert [run.checkpoint.export_hf for run in runs] == ["", "", "out"]
    assert runs[2].init == Init()


def test_one_stage_is_read_as_ever() -> None:
    [run] = parsed("--stage", "1", *COMMON)
    assert run.checkpoint.save == "runs/all" and run.stage == "1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stage", "1,2", "--for", "3", "--lr 1"], "--for 3: --stage names no such stage"),
        (["--stage", "1", "--for", "1", "--lr 1"], "--for 1: --stage names no such stage among"),
        (["--stage", "1,2", "--for", "2", "--save x"], "--for 2: --save is for all stages"),
        (["--stage", "1,2", "--for", "2"], "--for 2: its options follow, in quotes"),
        (["--stage", "1,1"], "--stage 1,1: names a stage twice"),
        (["--stage", "1,9"], "--stage 9: no such stage"),
        (["--stage", "1,2", "--save", ""], "several stages need --checkpoint.save"),
        (["--stage", "1,2", "--for", "2", "--stepz 3"], "unknown option --stepz"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, *arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_problems_of_all_stages_come_together(capsys: pytest.CaptureFixture) -> None:
    missing = "--checkpoint.load runs/all/stage_1: no such folder"
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, "--stage", "1,2", problems=("--lr 0: must be above 0", missing))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count(missing) == 1  # only of the first
    assert all(f"stage {name}: --lr 0: must be above 0" in said for name in ("1", "2"))


def test_what_ends_the_checks_is_told_alone(capsys: pytest.CaptureFixture) -> None:
    words = [*COMMON, "--stage", "1,2", "--architecture.objective", "mine"]
    with pytest.raises(SystemExit) as ended:
        parse_stages(words, None, rules.problems)
    assert ended.value.code == 2
    assert "error: --architecture.objective mine: no such obj" in capsys.readouterr().err


def test_configurations_are_printed_one_below_the_other(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, "--stage", "1,2", "--print_config")
    first, second = capsys.readouterr().out.split("---\n")
    assert ended.value.code == 0
    assert [from_yaml(text).stage for text in (first, second)] == ["1", "2"]
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, "--stage", "1,2", "--check", "8")
    assert "nothing is wrong with the configuration for 8 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("check", [["--check=8"], ["--check", "8"]])
def test_a_check_trains_nothing(check: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, "--stage", "1,2", *check)
    assert ended.value.code == 0
    assert "8 ranks" in capsys.readouterr().out


def test_a_number_behind_another_option_is_that_options() -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*COMMON, "--stage", "1", "--check", "--training.steps", "100")
    assert ended.value.code == 0


def test_measuring_alone_is_of_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*COMMON, "--stage", "1,2", "--eval.only", "true")
    assert "--eval.only true measures the weights of one stage" in capsys.readouterr().err


def test_stages_of_two_models_are_commands_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--recipe", "blip2", "--data.train", "packs", "--save", "runs/all"]
    with pytest.raises(SystemExit):
        parsed(*given, "--stage", "1,2")
    told = capsys.readouterr().err
    assert "stage 2: its model, of --architecture.objective next_token, is another one" in told


@pytest.mark.parametrize(
    ("stage", "yaml", "told"),
    [
        ("2", "checkpoint:\n  load: x\n", "own.yaml, line 2: checkpoint.load x: it starts from"),
        ("2", "init:\n  vision: x\n", "line 2: init.vision x: it starts from stage 1; leave it"),
        ("1", "checkpoint:\n  save: x\n", "checkpoint.save x: all stages together have runs/all"),
        ("1", "stage: 1.5\n", "stage 1.5: it is 1, as the command says"),
        ("2", "recipe: llava\n", "recipe llava: it is internvl, as the command says"),
        ("2", "optimizer:\n  lr: 3e-5\n", "optimizer.lr 3e-5: --optimizer.lr 1e-4 of all"),
    ],
)
def test_options_of_one_stage_that_would_not_count_are_refused(
    stage: str, yaml: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "own.yaml").write_text(yaml)
    with pytest.raises(SystemExit):
        parsed(
            *(*COMMON, "--stage", "1,2", "--lr", "1e-4"),
            *("--for", stage, f"--config {tmp_path / 'own.yaml'}"),
        )
    assert told in capsys.readouterr().err


def test_a_later_stage_refuses_parts_and_obeys_what_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parsed(*COMMON, "--stage", "1,2", "--for", "2", "--init.language x --init.vision y")
    assert "stage 2: --for: init.language x: it starts from stage 1" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("checkpoint: {weights_only: true, export_hf: out}\n")
    given = ["--stage", "1,1.5,2", "--for", "1.5", f"--config {tmp_path / 'own.yaml'}"]
    runs = parsed(*COMMON, *given)
    assert [run.checkpoint.weights_only for run in runs] == [False, True, False]
    assert [run.checkpoint.export_hf for run in runs] == ["", "out", ""]
    with pytest.raises(SystemExit):
        parsed(*COMMON, *given, "--checkpoint.export_hf", "out")
    assert "stage 2: --checkpoint.export_hf out: stage 1.5 exports to the same folder" in (
        capsys.readouterr().err
    )


def test_the_average_is_exported_by_the_stages_that_export() -> None:
    common = [*COMMON, "--ema.decay", "0.9", "--ema.export", "true", "--stage", "1,1.5,2"]
    runs = parsed(*common, "--checkpoint.export_hf", "out")
    assert [run.ema.export for run in runs] == [False, False, True]
    assert [run.ema.decay for run in runs] == [0.9] * 3
    own = ["--for", "1", "--checkpoint.export_hf one"]
    runs = parsed(*common, "--checkpoint.export_hf", "out", *own)
    assert [run.ema.export for run in runs] == [True, False, True]


def test_what_a_later_stage_starts_from_is_checked_as_what_the_first_one_has() -> None:
    seen = []
    parse_stages(
        [*COMMON, "--stage", "1,2", "--load", "start"],
        lambda *_: None,
        lambda config, ranks: seen.append(config) or ["--checkpoint.load start: none"][:0],
    )
    assert [config.checkpoint.load for config in seen] == ["start", "start"]
