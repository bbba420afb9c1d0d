"""Where a run's architecture and weights come from: a row of the table, a folder, or parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.cli import from_yaml, parse, to_yaml
from megavlm.config.models import MODELS, architecture
from megavlm.config.objectives import OBJECTIVES
from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Checkpoint, Connector, Init, Language, Vision

FOUND = Architecture(connector=Connector(pixel_shuffle=7))


def read(folder: str, init: Init, default: Architecture | None = None) -> Architecture:
    """Return what tells what was asked for."""
    assert folder or init.language or default
    found = FOUND if default is None else default
    return dataclasses.replace(found, vision=Vision(num_layers=len(folder) or 99))


def test_a_folder_fills_the_architecture_and_options_still_win(tmp_path: Path) -> None:
    config = parse(
        ["--stage", "1", "--model", str(tmp_path), "--architecture.vision.hidden_size", "33"], read
    )
    assert config.model == str(tmp_path) and config.architecture.connector.pixel_shuffle == 7
    assert config.architecture.vision == Vision(num_layers=len(str(tmp_path)), hidden_size=33)
    assert from_yaml(to_yaml(config)) == config


def test_two_parts_need_no_model(tmp_path: Path) -> None:
    (tmp_path / "eyes").mkdir()
    (tmp_path / "run.yaml").write_text(
        f"stage: 1\ninit: {{vision: {tmp_path}/eyes, language: nowhere}}\n"
    )
    config = parse(["--config", str(tmp_path / "run.yaml"), "--init.language", str(tmp_path)], read)
    assert config.init == Init(vision=f"{tmp_path}/eyes", language=str(tmp_path))
    assert config.model == f"eyes+{tmp_path.name}" and config.architecture.vision.num_layers == 99


def test_one_part_needs_a_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse(["--stage", "1", "--init.vision", str(tmp_path)], read)
    assert "missing --model (one of a Hugging Face folder, tiny, " in capsys.readouterr().err
    config = parse(["--stage", "1", "--init.vision", str(tmp_path), "--model", "tiny"], read)
    assert config.architecture == MODELS["tiny"] and config.init == Init(vision=str(tmp_path))


def test_a_language_model_goes_with_options_for_the_vision_encoder(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    arguments = ["--stage", "1", "--init.language", str(tmp_path)]
    with pytest.raises(SystemExit):
        parse(arguments, read)
    assert "--init.vision or --architecture.vision options" in capsys.readouterr().err
    config = parse([*arguments, "--architecture.vision.hidden_size", "33"], read)
    assert config.architecture.vision == Vision(num_layers=99, hidden_size=33)
    assert config.architecture.connector.pixel_shuffle == 7 and config.model == tmp_path.name
    (tmp_path / "run.yaml").write_text("architecture: {vision: {hidden_size: 33}}\n")
    assert parse([*arguments, "--config", str(tmp_path / "run.yaml")], read) == config
    folder = tmp_path / "eyes"
    folder.mkdir()
    assert (
        parse([*arguments, "--model", str(folder)], read).architecture.connector.pixel_shuffle == 7
    )


def test_names_of_the_table_win_over_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert architecture("tiny", read_model=read) == MODELS["tiny"]
    assert architecture("./tiny", read_model=read).connector.pixel_shuffle == 7
    with pytest.raises(ValueError, match=r"--model big: no such model, no such folder"):
        architecture("big", read_model=read)


def test_where_weights_come_from_is_said_once(tmp_path: Path) -> None:
    parts = [
        "--init.vision",
        str(tmp_path),
        "--load",
        str(tmp_path),
        "--init.language",
        "no",
        "--init.tokenizer",
        "none",
    ]
    config = parse(["--stage", "1", "--model", "tiny", *parts], read)
    said = f"and --checkpoint.load {tmp_path} both say where weights come from; give one of them"
    assert [line for line in problems(config, 1) if "--init" in line] == [
        "--init.language no: no such folder",
        "--init.tokenizer none: no such folder",
        f"--init.vision {tmp_path} {said}",
        f"--init.language no {said}",
    ]
    alone = dataclasses.replace(config, init=Init(tokenizer=str(tmp_path)))
    assert f"--init.tokenizer {tmp_path} needs --init.language, whose tokenizer it is" in problems(
        alone, 1
    )


def test_what_internvls_formats_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    config = parse(["--stage", "1", "--model", "tiny", "--architecture.vision.family", "siglip"])
    config = dataclasses.replace(
        config, checkpoint=Checkpoint(save=str(tmp_path / "run"), export_hf=str(tmp_path / "out"))
    )
    assert any(
        line.startswith(f"--checkpoint.export_hf {tmp_path}/out: ") and "siglip" in line
        for line in problems(config, 1)
    )


@pytest.fixture
def known_model(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """Register a recipe that is known for a model."""
    model = Architecture(
        vision=Vision(family="siglip", num_layers=2),
        connector=Connector(pixel_shuffle=1),
        language=Language(num_layers=5),
    )
    row = Recipe(
        name="mine",
        description="a recipe with a model",
        stages={"1": Stage(description="the only stage")},
        architecture=model,
    )
    monkeypatch.setitem(RECIPES, "mine", row)
    return model


def test_a_recipe_with_a_model_needs_none(known_model: Architecture, tmp_path: Path) -> None:
    arguments = ["--recipe", "mine", "--stage", "1"]
    config = parse(arguments, read)
    assert config.model == "mine" and config.architecture == known_model
    changed = parse([*arguments, "--architecture.language.num_layers", "7"], read).architecture
    assert changed.language == Language(num_layers=7) and changed.vision == known_model.vision
    assert parse([*arguments, "--model", "tiny"], read).architecture == MODELS["tiny"]
    part = parse([*arguments, "--init.vision", str(tmp_path)], read)
    assert part.model == tmp_path.name and part.init == Init(vision=str(tmp_path))
    assert part.architecture == dataclasses.replace(known_model, vision=Vision(num_layers=99))


def test_a_stage_names_its_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "mine", OBJECTIVES["next_token"])
    stages = {
        "1": Stage(description="another objective", objective="mine"),
        "2": Stage(description="the usual one"),
    }
    row = Recipe(name="mine", description="a recipe", stages=stages)
    monkeypatch.setitem(RECIPES, "mine", row)
    arguments = ["--recipe", "mine", "--model", "tiny", "--stage"]
    assert parse([*arguments, "1"]).architecture == dataclasses.replace(
        MODELS["tiny"], objective="mine"
    )
    assert parse([*arguments, "2"]).architecture == MODELS["tiny"]
    wrong = parse([*arguments, "1", "--architecture.objective", "none"])
    told = "--architecture.objective none: no such objective; known are next_token"
    with pytest.raises(ValueError, match=told):
        problems(wrong, 1)
