"""Folders that users name on command lines: ``--model DIR``, and the tokenizer of a part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.cli import parse
from megavlm.config.models import MODELS
from megavlm.config.schema import Architecture, Init
from megavlm.convert.hf.from_parts import extend_tokenizer
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from megavlm.evaluate.packs import usage_of
from megavlm.job_checks import problems
from megavlm.model_source import image_model, read_model, recipe_problems
from tests.convert.models import KINDS, SMALL, TOKENIZER, make_hf
from tests.convert.part_folders import WORDS, make_parts, make_tokenizer, make_vision
from tests.convert.qwen_vl_models import SMALL as SMALL_QWEN
from tests.convert.qwen_vl_models import make_qwen_vl
from tests.convert.tool import run_tool


@pytest.mark.parametrize("kind", ["qwen2", "qwen3 tied", "InternViT-6B"])
def test_a_run_takes_its_architecture_from_a_folder(tmp_path: Path, kind: str) -> None:
    folder = make_hf(tmp_path / "hf", KINDS[kind])
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2})
    )
    config = parse(["--stage", "2", "--model", str(folder)], read_model)
    vision = replace(
        KINDS[kind].vision,
        pixel_mean=(0.1, 0.2, 0.3),
        pixel_std=(0.4, 0.5, 0.6),
        resample="bilinear",
    )
    assert config.architecture == replace(KINDS[kind], vision=vision) == image_model(str(folder))


def test_a_run_takes_its_architecture_from_parts(tmp_path: Path) -> None:
    _, vision, words = make_parts(tmp_path, SMALL)
    config = parse(
        ["--stage", "1", "--init.vision", str(vision), "--init.language", str(words)], read_model
    )
    assert config.architecture == replace(
        SMALL, language=replace(SMALL.language, vocab_size=WORDS + 9)
    )
    assert config.model == "vision+language"


def test_packs_need_only_the_vision_encoder(tmp_path: Path) -> None:
    clip = image_model(str(make_vision(tmp_path / "clip", "clip")))
    assert (clip.vision.family, clip.features_per_tile, clip.vision.pixel_std) == (
        "clip",
        16,
        (0.27, 0.26, 0.28),
    )
    assert (
        image_model("internvl2_5-1b") == MODELS["internvl2_5-1b"]
        and image_model(None) == Architecture()
    )
    with pytest.raises(ValueError, match="--model nano"):
        image_model("nano")


@pytest.mark.parametrize("name", ["clip", "tiny"])  # a recipe's model, and a row of the table
def test_a_name_that_a_folder_has_too_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    known = image_model(name)
    Path(name).mkdir()
    assert image_model(name) == known  # a folder of runs, perhaps
    make_vision(Path(name), "clip")
    with pytest.raises(ValueError, match=f"^--model {name}: .* ./{name}, for .* rename it$"):
        image_model(name)
    assert image_model(f"./{name}").vision.family == "clip"


@pytest.mark.parametrize(("part", "told"), [("language", "qwen2, "), ("vision", "intern_vit_6b, ")])
def test_a_whole_model_of_another_kind_is_no_part(tmp_path: Path, part: str, told: str) -> None:
    parts = map(str, make_parts(tmp_path, SMALL)[1:])
    folders = dict(zip(("vision", "language"), parts, strict=True))
    folders[part] = str(tmp_path / "whole")
    Path(folders[part]).mkdir()
    kind = {"model_type": "mllama", "vision_config": {}}
    (Path(folders[part]) / "config.json").write_text(json.dumps(kind))
    with pytest.raises(ValueError, match=f"mllama', must be one of {told}.*; no part of a") as e:
        read_model("", Init(**folders))
    assert f"--init.{part} {folders[part]}" in str(e.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_parameters": {"rope_type": "llama3"}}, "rotary positions are of type 'llama3'"),
        ({"hidden_size": 49}, "hidden_size is 49, must be a multiple of"),
    ],
)
def test_what_is_wrong_with_a_language_model_is_told_without_a_section(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    _, vision, words = make_parts(tmp_path, SMALL)
    path = words / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"\n  {told}"):
        read_model("", Init(vision=str(vision), language=str(words)))


def test_a_folder_of_a_model_that_another_recipe_trains_is_refused(tmp_path: Path) -> None:
    qwen = make_qwen_vl(tmp_path / "qwen", SMALL_QWEN)
    internvl = make_hf(tmp_path / "internvl", SMALL)

    def found(recipe: str, stage: str, *options: str) -> list[str]:
        return list(
            recipe_problems(parse(["--recipe", recipe, "--stage", stage, *options], read_model))
        )

    told = f"--model {qwen} is another model, of model_type 'qwen2_5_vl' in its config.json; use"
    for recipe, stage in (("qwen2_vl", "finetune"), ("internvl", "2"), ("qwen3_vl", "sft")):
        problem = f"--recipe {recipe}: {told} --recipe qwen2_5_vl"
        assert found(recipe, stage, "--model", str(qwen)) == [problem]
    config = parse(
        ["--recipe", "qwen2_vl", "--stage", "finetune", "--model", str(qwen)], read_model
    )
    assert any(told in problem for problem in problems(config, 1))
    assert found("llava", "2", "--model", str(internvl))[0].endswith("; use --recipe internvl")
    assert found("qwen2_5_vl", "sft", "--model", str(qwen)) == []
    assert found("internvl", "2", "--model", str(internvl)) == []
    assert found("internvl", "2", "--model", "tiny") == found("qwen2_vl", "1") == []
    encoder = make_vision(tmp_path / "siglip", "siglip")
    make_parts(tmp_path, SMALL)
    parts = ["--model", str(encoder), "--init.language", str(tmp_path / "language")]
    assert found("internvl", "1", *parts) == []


@pytest.mark.slow
def test_packs_for_a_folder_have_its_sizes_and_pixels(tmp_path: Path) -> None:
    vision = make_vision(tmp_path / "siglip", "siglip")
    path = vision / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    arguments = [
        "--model",
        str(vision),
        "--tokenizer",
        str(TOKENIZER),
        "--jsonl",
        str(tmp_path / "chats.jsonl"),
        "--workers",
        "0",
    ]
    arguments += ["--out", str(tmp_path / "packs"), "--capacity", "256"]
    assert run_tool(*arguments, tool="pack_dataset") == 0
    manifest = read_manifest(tmp_path / "packs")
    assert (manifest.image_size, manifest.features_per_tile) == (21, 16)
    assert (manifest.pixel_mean, manifest.pixel_std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    assert manifest.resample == usage_of(tmp_path / "packs")[2].resample == "bilinear"


@pytest.mark.slow
def test_the_tool_writes_the_tokenizer_that_a_run_from_parts_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "llm")

    def run(*words: str) -> int:
        return run_tool(*words, tool="extend_tokenizer")

    assert run("--init.language", str(tmp_path / "llm"), "--out", str(tmp_path / "out")) == 0
    assert f"9 tokens added, {WORDS} to {WORDS + 8}" in capsys.readouterr().out
    expected, _ = extend_tokenizer(Init(language=str(tmp_path / "llm")))
    assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(expected)
    assert run("--hf", str(tmp_path / "out"), "--out", str(tmp_path / "out")) == 2
    assert f"--out {tmp_path}/out: exists" in capsys.readouterr().err
    assert run("--hf", str(tmp_path / "none"), "--out", str(tmp_path / "other")) == 2
    assert "--init.language" in capsys.readouterr().err and not (tmp_path / "other").exists()
