"""The command line: precedence, names, types, messages, and configurations as YAML."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavlm.config.cli import from_yaml, parse, to_yaml
from megavlm.config.help_text import section_names
from megavlm.config.models import MODELS
from megavlm.config.options import ALIASES, options
from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.internvl import RECIPE, STAGES
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Config, Data, Optimizer, Training

NAMES = ["--stage", "1", "--model", "tiny"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_names_pick_rows_of_the_tables(stage: str, model: str):
    config = parse(["--stage", stage, "--model", model])
    row = STAGES[stage]
    assert config == Config(
        stage=stage,
        model=model,
        architecture=dataclasses.replace(MODELS[model], objective=row.objective),
        data=RECIPE.data(stage),
        optimizer=row.optimizer,
        training=row.training,
    )


@pytest.fixture
def other_recipe(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(
        description="a stage", loss_reduction="token", training=Training(steps=77, drop_path=0.2)
    )
    recipe = Recipe(name="mine", description="another recipe", stages={"only": stage})
    monkeypatch.setitem(RECIPES, "mine", recipe)
    return stage


def test_a_recipe_gives_the_stages(
    other_recipe: Stage, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = parse(["--recipe", "mine", "--stage", "only", "--model", "tiny"])
    assert (config.recipe, config.data.loss_reduction) == ("mine", "token")
    assert config.training == other_recipe.training and config.optimizer == Optimizer()
    assert from_yaml(to_yaml(config)) == config
    (tmp_path / "run.yaml").write_text("recipe: mine\nstage: only\nmodel: tiny\n")
    assert parse(["--config", str(tmp_path / "run.yaml")]) == config
    assert "known are only" in refused(["--recipe", "mine", *NAMES], capsys)
    assert ", mine" in refused(["--recipe", "his", *NAMES], capsys)
    assert parse(NAMES).recipe == "internvl"


def test_the_configuration_of_a_run_from_before_recipes_is_one_of_internvl():
    text = to_yaml(parse(NAMES)).replace("recipe: internvl\n", "", 1)
    assert "recipe" not in text and from_yaml(text) == parse(NAMES)


def test_later_sources_win(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "training: {steps: 7, seed: 8}\noptimizer: {lr: 1e-3}\narchitecture: {language:"
        " {num_layers: 6}}\n"
    )
    (tmp_path / "b.yaml").write_text("training:\n  seed: 9\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse([*NAMES, "--optimizer.lr", "5e-3", *files])
    assert (
        config.architecture.vision == MODELS["tiny"].vision
        and config.architecture.language.num_layers == 6
    )
    assert config.training == Training(steps=7, seed=9, global_batch_size=512)
    assert config.optimizer == dataclasses.replace(STAGES["1"].optimizer, lr=5e-3)


@pytest.mark.parametrize(
    ("written", "stage"), [("1.5", "1.5"), ("1", "1"), ('"1.5"', "1.5"), ("'2'", "2"), ("0", "0")]
)
def test_a_stage_in_a_file_may_be_a_number_or_a_text(written: str, stage: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(f"stage: {written}\nmodel: tiny\n")
    config = parse(["--config", str(path)])
    assert config.stage == stage and config.training == STAGES[stage].training
    assert parse(["--config", str(path), "--stage", "2"]).training == STAGES["2"].training


def test_lists_have_commas_on_the_command_line_and_are_lists_in_files(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        "parallel: {layout: 'v*4,t|t*3'}\ntraining:\n  trainable: [connector, 'vision.*']\n"
    )
    config = parse([*NAMES, "--config", str(tmp_path / "run.yaml")])
    assert config.parallel.layout == "v*4,t|t*3" and config.training.trainable == (
        "connector",
        "vision.*",
    )
    config = parse(
        [
            *NAMES,
            "--architecture.vision.pixel_mean",
            "0.5,0.4,0.3",
            "--training.trainable",
            "vision,connector",
        ]
    )
    assert config.architecture.vision.pixel_mean == (
        0.5,
        0.4,
        0.3,
    ) and config.training.trainable == ("vision", "connector")
    assert parse(
        [*NAMES, "--architecture.vision.pixel_mean=0.5,0.5,0.5"]
    ).architecture.vision.pixel_mean == (0.5, 0.5, 0.5)


def test_normalisations_have_names(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("architecture: {vision: {pixel_std: clip}}\n")
    config = parse(
        [
            *NAMES,
            "--config",
            str(tmp_path / "run.yaml"),
            "--architecture.vision.pixel_mean",
            "siglip",
        ]
    )
    assert config.architecture.vision.pixel_mean == (0.5, 0.5, 0.5)
    assert config.architecture.vision.pixel_std == (0.26862954, 0.26130258, 0.27577711)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.slow
def test_every_alias_sets_the_field_that_it_stands_for():
    kinds = {int: 3, float: 0.25, bool: True, str: "some"}
    others = {
        "parallel.recompute": "full",
        "parallel.overlap_grad_reduce": "false",
        "parallel.overlap_param_gather": "false",
        "optimizer.schedule": "constant",
        "optimizer.wsd_decay": "linear",
        "optimizer.weight_decay_schedule": "linear",
        "architecture.connector.norm": "false",
        "fp8.format": "e4m3",
        "fp8.language": "tensorwise",
        "experts.dispatcher": "allgather",
    }
    plain = parse(NAMES)
    for alias, key in ALIASES.items():
        value = others.get(key) or kinds[options()[key].kind]
        expected = with_value(plain, key, {"false": False}.get(value, value))
        config = parse([*NAMES, alias, str(value).lower()])
        assert config == expected != plain, alias


def with_value(config: Any, key: str, value: Any) -> Any:
    name, _, inner = key.partition(".")
    return dataclasses.replace(
        config, **{name: with_value(vars(config)[name], inner, value) if inner else value}
    )


def test_a_switch_needs_no_value():
    assert parse([*NAMES, "--sequence-parallel", "--lr", "0.5"]).parallel.sequence_parallel
    assert parse([*NAMES, "--parallel.sequence_parallel"]).parallel.sequence_parallel
    assert not parse([*NAMES, "--sequence-parallel", "false"]).parallel.sequence_parallel


def test_a_value_may_be_options_of_the_packer():
    assert parse([*NAMES, "--data.packing", "--root images"]).data.packing == "--root images"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--stage (one of 0, 1, 1.5, 2, mpo)", "--model (one of a Hugging Face folder, tiny"]),
        (["--stage", "3", "--model", "tiny"], ["--stage 3: no such stage", "0, 1, 1.5, 2, mpo"]),
        (["--stage", "1", "--model", "big"], ["--model big: no such model", "internvl2_5-4b"]),
        ([*NAMES, "--trainig.steps", "3"], ["--trainig.steps; did you mean --training.steps?"]),
        ([*NAMES, "--steps", "3"], ["--steps; did you mean --training.steps?"]),
        (
            [*NAMES, "--checkpoint.interval", "3"],
            ["did you mean --checkpoint.save_interval or --logging.interval?"],
        ),
        ([*NAMES, "--training.train_iters", "3"], ["did you mean --train-iters?"]),
        ([*NAMES, "--optimizer-cpu-offload"], ["could not be resumed at another", "LoRA"]),
        ([*NAMES, "--micro-batch-size", "1"], ["a microbatch is one pack", "global_batch_size"]),
        ([*NAMES, "--seq-length", "4096"], ["tools/pack_dataset.py --capacity"]),
        (["--stage", "1", "--model", "internvl2.5-8b"], ["did you mean internvl2_5-8b?"]),
        ([*NAMES, "--training.step", "3"], ["unknown option --training.step;"]),
        ([*NAMES, "--training.steps", "3.5"], ["--training.steps: expected an integer; got 3.5"]),
        ([*NAMES, "--lr", "fast"], ["--optimizer.lr: expected a number; got fast"]),
        (
            [*NAMES, "--training.precision", "float16"],
            ["expected one of bfloat16, float32; got float16"],
        ),
        ([*NAMES, "--architecture.vision.pixel_mean", "1,a,2"], ["expected 3 numbers with commas"]),
        ([*NAMES, "--architecture.vision.pixel_std", "1,1"], ["expected 3 numbers"]),
        ([*NAMES, "--parallel.sequence_parallel", "3"], ["expected true or false; got 3"]),
        ([*NAMES, "--config", "missing.yaml"], ["--config missing.yaml: no such file"]),
        ([*NAMES, "stray"], ["stray"]),
    ],
)
def test_wrong_command_lines_get_a_short_message(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture
):
    message = refused(arguments, capsys)
    assert all(word in message for word in words), message
    assert message.count("\n") <= 2 and "usage" not in message and "class" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {stesp: 3}", ["unknown key training.stesp; did you mean training.steps"]),
        ("steps: 3", ["unknown key steps; did you mean training.steps"]),
        ("training: 3", ["training (a section"]),
        ("training: {steps: many}", ["--training.steps: expected an integer; got many"]),
        (
            "architecture: {vision: {pixel_mean: 3}}",
            ["--architecture.vision.pixel_mean: expected 3 numbers"],
        ),
        ("- 1", ["expected keys and values"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_wrong_files_get_a_message_with_their_name(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused([*NAMES, "--config", str(path)], capsys)
    assert all(word in message for word in [str(path), *words]), message


def test_another_rank_gives_the_first_time_to_end_the_job_before_it_speaks(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    waits = []
    for name, value in dict(WORLD_SIZE="4", MASTER_ADDR="here", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", waits.append)
    assert "error on rank 3 (" in refused(["--stage", "3", "--model", "tiny"], capsys)
    assert len(waits) == 1 and waits[0] >= 1


def test_help_names_every_option_and_shows_the_defaults_of_the_stage(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help", "all", "--stage", "2", "--model", "tiny"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert all(f"--{key}" in shown for key in options()) and all(
        alias in shown for alias in ALIASES
    )
    assert (
        "peak learning rate (default: 4e-05)" in shown
        and "(default: vision,connector,language)" in shown
    )
    assert "``" not in shown


def helped(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_an_overview(flag: str, capsys: pytest.CaptureFixture):
    shown = helped([flag, "--recipe", "llava"], capsys)
    names = (*RECIPES, *RECIPES["llava"].stages, *MODELS, *section_names())
    assert all(name in shown for name in names)
    assert len(shown.splitlines()) < 100 and "--parallel.bucket_size" not in shown


def test_help_lists_the_options_of_a_section_or_tells_of_one(capsys: pytest.CaptureFixture):
    for word, inside in (("parallel", "parallel."), ("architecture", "architecture.")):
        shown = helped([*NAMES, "--help", word], capsys).replace(",", " ")  # Python 3.13's
        for key in options():
            assert (f"\n  --{key} " in shown) == key.startswith(inside), (word, key)
    for word in ("lr", "--lr", "optimizer.lr"):
        shown = helped([f"--help={word}", *NAMES], capsys)
        assert f"peak learning rate (default: {STAGES['1'].optimizer.lr})" in shown
        assert "--optimizer.min_lr" not in shown
    assert "\n  --recipe " in helped(["--help", "run"], capsys)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("paralel", "--help paralel: no such section or option; did you mean parallel?"),
        ("bucket", "did you mean parallel.bucket_size or ddp-bucket-size?"),
        ("zzz", "--help without a word lists the sections"),
    ],
)
def test_help_names_what_a_word_may_have_meant(word: str, told: str, capsys: pytest.CaptureFixture):
    assert told in refused(["--help", word], capsys)


def test_print_config_prints_what_would_run(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    arguments = [*NAMES, "--lr", "0.125"]
    with pytest.raises(SystemExit) as stopped:
        parse([*arguments, "--print_config"])
    assert stopped.value.code == 0
    assert from_yaml(capsys.readouterr().out) == parse(arguments)
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse([*arguments, "--print_config"])
    assert capsys.readouterr().out == ""


def test_check_ends_with_a_verdict(capsys: pytest.CaptureFixture):
    asked = []

    def find_problems(config: Config, ranks: int) -> list[str]:
        asked.append(ranks)
        return ["--lr: too high"] if config.optimizer.lr > 1 else []

    for arguments, status, ranks, told in (
        (["--check"], 0, 1, "nothing is wrong with the configuration for 1 rank\n"),
        (["--check", "8"], 0, 8, "nothing is wrong with the configuration for 8 ranks\n"),
        (["--check", "8", "--lr", "2"], 2, 8, "1 problem with the configuration:\n  --lr: too"),
        (["--lr", "2"], 2, 1, "1 problem with the configuration:\n  --lr: too high"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse([*NAMES, *arguments], find_problems=find_problems)
        shown = capsys.readouterr()
        assert (stopped.value.code, asked[-1]) == (status, ranks)
        assert told in (shown.err if status else shown.out)
    assert "--check -3: must be" in refused([*NAMES, "--check", "-3"], capsys)


def test_yaml_gives_exactly_the_configuration_back(tmp_path: Path):
    odd = Optimizer(lr=0.1 + 0.2, adam_eps=1e-12, min_lr=1 / 3)
    training = Training(trainable=("vision.encoder.layers.[01].*", "1.5"), seed=2**40)
    config = dataclasses.replace(
        parse(["--stage", "1.5", "--model", "tiny"]), optimizer=odd, training=training
    )
    config = dataclasses.replace(
        config, model="/models/größe: 7", data=dataclasses.replace(config.data, train="1e3")
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path) == config == from_yaml(to_yaml(config))
    assert yaml.safe_load(to_yaml(config))["stage"] == "1.5"


@pytest.mark.parametrize(
    ("options", "group", "strata"),
    [
        ("--global-batch-size 128", 16, 8),
        ("--global-batch-size 4", 1, 4),
        ("--global-batch-size 128 --data.group 1", 1, 1),
        ("--global-batch-size 128 --data.group 1 --data.strata 8", 1, 8),
        ("--global-batch-size 128 --data.strata 1", 128, 1),
    ],
)
def test_a_step_has_a_bucket_of_each_stratum(options: str, group: int, strata: int):
    config = parse([*NAMES, *options.split()])
    assert (config.group, config.strata) == (group, strata)


def test_yaml_with_missing_fields_gets_the_schema_and_not_the_tables():
    before = Data(strata=1)  # files that do not say it were written when there was nothing else
    assert from_yaml("stage: '2'\nmodel: tiny\n") == Config(stage="2", model="tiny", data=before)
    with pytest.raises(ValueError, match="unknown key traning"):
        from_yaml("traning: {steps: 3}")


def test_the_recipe_of_the_examples_resolves():
    found = sorted(Path(__file__).parents[2].glob("examples/*/*.yaml"))
    # Those of lmms-eval are another program's.
    ours = [path for path in found if path.parent.name != "lmms_eval"]
    assert len(ours) >= 10
    for path in ours:
        # One that several stages share leaves the stage to the command.
        shared = [] if "stage:" in path.read_text() else ["--stage", "1"]
        config = parse(["--config", str(path), *shared])
        row = RECIPES[config.recipe].stage(config.stage)
        if not config.architecture.lora.rank:  # adapters are trained in the place of parts
            assert config.training.trainable == row.training.trainable, path
