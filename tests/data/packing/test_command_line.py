"""What the packer's command line makes of sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.config.models import MODELS
from megavlm.config.objectives import OBJECTIVES
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import ANY
from megavlm.config.vision import PIXELS
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.asked_stage import (
    form_warnings,
    model_warnings,
    other_templates,
    taken_settings,
)
from megavlm.data.packing.command_line import parse
from megavlm.model_source import image_model


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "records.jsonl").write_text("{}\n")
    return [
        "--jsonl",
        str(tmp_path / "records.jsonl"),
        "--tokenizer",
        str(tmp_path),
        "--out",
        "packs",
    ]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ([], 256),
        (["--image_size", "224"], 64),
        (["--image_size", "224", "--patch_size", "28"], 16),
        (["--tokens_per_tile", "32"], 32),
        (["--template", "flamingo"], 1),
    ],
)
def test_the_model_and_its_sizes_say_how_many_tokens_a_tile_has(
    arguments: list[str], given: list[str], tokens: int
) -> None:
    job = make_job(parse([*arguments, *given]), MODELS["internvl2_5-1b"])
    assert job.features_per_tile == tokens


def test_a_stage_of_preferences_packs_pairs_of_answers(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["internvl2_5-1b"]
    assert not make_job(parse([*arguments, "--stage", "2"]), model).preferences
    asked = parse([*arguments, "--preferences", "--stage", "2"])
    assert make_job(asked, model).preferences and taken_settings(asked) == "--template internvl2_5"
    (told,) = form_warnings(asked)
    assert "--preferences: the stage is trained on single answers" in told
    assert list(form_warnings(parse([*arguments, "--preferences"]))) == []
    needs = dataclasses.replace(OBJECTIVES["next_token"], is_of_preferences=True)
    monkeypatch.setitem(OBJECTIVES, "next_token", needs)
    options = parse([*arguments, "--stage", "2"])
    assert make_job(options, model).preferences and list(form_warnings(options)) == []
    assert taken_settings(options) == "--template internvl2_5 --preferences"


def test_options_reach_the_job(arguments: list[str]) -> None:
    usual = make_job(parse(arguments), MODELS["internvl2_5-1b"])
    assert usual.decode_images and not usual.scan_pixels and usual.tiling.thumbnail
    given = "--headers_only --scan_pixels --no_thumbnail --resample bilinear --pixels clip"
    given += " --min_frames 3 --max_frames 5 --frame_sampling middle --tile_cap 7 --system none"
    job = make_job(parse([*arguments, *given.split()]), MODELS["internvl2_5-1b"])
    assert not job.decode_images and job.scan_pixels and not job.tiling.thumbnail
    assert job.tiling.resample == "bilinear" != usual.tiling.resample
    assert (job.tiling.pixel_mean, job.pixel_std) == PIXELS["clip"]
    assert usual.tiling.pixel_mean == PIXELS["imagenet"][0]
    assert job.frames == FrameChoice(min_frames=3, max_frames=5, sampling="middle") != usual.frames
    assert (job.tile_cap, usual.tile_cap) == (7, None)
    assert (job.system_message, usual.system_message) == ("", None)
    # A template with one token for an image fits any size.
    make_job(
        parse([*arguments, "--template", "flamingo", "--image_size", "462"]),
        MODELS["internvl2_5-1b"],
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--image_size", "450"], "--image_size 450, --patch_size 14: the first must be"),
        (["--image_size", "462"], "does not divide the 33 patches"),
        (["--patch_size", "0"], "must be 1 or more"),
        (["--tokens_per_tile", "0"], "--tokens_per_tile 0: must be 1 or more"),
        (["--tokens_per_tile", "9", "--template", "flamingo"], "has one placeholder token"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(
    arguments: list[str], given: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_job(parse([*arguments, *given]), MODELS["internvl2_5-1b"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--out", ""], "--out is required"),
        (["--out", "a\udcff"], r"argument --out: 'a\udcff': not UTF-8"),
        (["--root", "a\0b"], r"argument --root: 'a\x00b': not UTF-8, or with a zero byte"),
        (["--system", "\ud800"], r"argument --system: '\ud800': not UTF-8"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(
    arguments: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*arguments, *given])
    assert told in capsys.readouterr().err


def test_an_option_that_is_gone_says_what_to_do(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*arguments, "--pixel_shuffle", "2"])
    assert "--tokens_per_tile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--template", "llava_plain"], "give --tiling crop or stretch, or --data.tiling dynamic"),
        (["--template", "paligemma", "--tiling", "pad"], "give --tiling stretch, or --data.tiling"),
        (["--template", "paligemma", "--tiling", "stretch"], ""),
        (["--template", "clip", "--tiling", "crop"], ""),  # its stages take any
        ([], ""),
    ],
)
def test_tiles_that_no_stage_takes_are_warned_of(
    arguments: list[str], given: list[str], told: str
) -> None:
    found = list(form_warnings(parse([*arguments, *given])))
    assert len(found) == bool(told) and all(told in text for text in found)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("--recipe llava --stage 1", "--template llava_plain --tiling crop --model llava"),
        ("--recipe llava --stage 2", "--template llava_v1 --tiling pad --model llava"),
        ("--recipe llava --stage 2 --tiling pad", "--template llava_v1 --tiling pad --model llava"),
        (
            "--recipe paligemma --stage 2 --model fuyu",
            "--template paligemma --tiling stretch --image_size 448",
        ),
        ("--recipe clip --template siglip", "--model clip"),
        # All stages of this one read the same packs.
        (
            "--recipe flamingo",
            "--template flamingo_plain --tiling stretch --model flamingo",
        ),
        (
            "--recipe qwen2_5_vl --stage 3",
            "--template qwen2_vl --tiling native --capacity 32768 --model qwen2_5_vl",
        ),
        (
            "--recipe qwen3_vl --stage 1 --capacity 4096",
            "--template qwen3_vl --tiling native --model qwen3_vl",
        ),
        ("--recipe internvl --stage 0", ""),
        ("--stage 1.5", "--template internvl2_5"),
        ("", ""),
    ],
)
def test_a_stage_says_what_its_packs_are_like(arguments: list[str], given: str, taken: str) -> None:
    options = parse([*arguments, *given.split()])
    assert taken_settings(options) == taken
    settings = taken.split()
    for flag, value in zip(settings[::2], settings[1::2], strict=True):
        assert str(vars(options)[flag.removeprefix("--")]) == value


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ("--recipe llava --stage 2", ["llava_chatml"]),
        ("--recipe llava --stage 2 --template llava_chatml", []),  # chosen, so no word about it
        ("--recipe llava_next --stage 2", ["llava_mistral", "llava_chatml"]),
        ("--recipe llava --stage 1", []),
        ("--recipe flamingo", ["flamingo", "flamingo_chunks_plain", "flamingo_chunks"]),
        ("", []),
    ],
)
def test_a_stage_says_which_other_templates_it_takes(
    arguments: list[str], given: str, others: list[str]
) -> None:
    assert other_templates(parse([*arguments, *given.split()])) == others


@pytest.mark.parametrize("name", RECIPES)
def test_packs_as_a_stage_has_them_are_what_it_is_trained_on(
    arguments: list[str], name: str
) -> None:
    for stage in RECIPES[name].stages:
        options = parse([*arguments, "--recipe", name, "--stage", stage])
        data = RECIPES[name].data(stage)
        assert options.template in data.template or data.template == (ANY,)
        assert options.tiling == data.tiling or data.tiling == ANY
        assert list(form_warnings(options)) == []
        size = RECIPES[name].stage(stage).image_size
        assert make_job(options, image_model(options.model)).tiling.tile_size == (
            size or image_model(options.model).vision.image_size
        )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--model qwen2_5-vl-3b", "--tiling dynamic: --model qwen2_5-vl-3b reads images of any"),
        ("--tiling native", "--tiling native: InternVL2.5, which no --model means, reads each"),
        ("--model llava --tiling native", "--tiling native: --model llava reads each tile"),
        ("--model qwen2_5-vl-3b --recipe qwen2_5_vl --stage sft", ""),
        ("--model internvl2_5-1b", ""),
    ],
)
def test_tiles_that_the_model_does_not_read_are_warned_of(
    arguments: list[str], given: str, told: str
) -> None:
    options = parse([*arguments, *given.split()])
    found = list(model_warnings(options, image_model(options.model)))
    assert len(found) == bool(told) and all(told in text for text in found)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--stage 2 --tiling crop", ["--tiling crop: the stage is not trained on such tiles"]),
        (
            "--stage 1 --template llava_v1",
            ["--template llava_v1: the stage is not trained on such packs; give --template"],
        ),
        (
            "--stage 1 --template paligemma --tiling stretch",
            ["give --template llava_plain,", "give --tiling crop,"],
        ),
        ("--stage 2 --template llava_chatml", []),
    ],
)
def test_packs_that_the_stage_is_not_trained_on_are_warned_of(
    arguments: list[str], given: str, told: list[str]
) -> None:
    found = list(form_warnings(parse([*arguments, "--recipe", "llava", *given.split()])))
    assert len(found) == len(told)
    assert all(part in text for part, text in zip(told, found, strict=True))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--recipe lava --stage 2", "--recipe lava: no such recipe; known are internvl, llava"),
        ("--recipe llava --stage 3", "--stage 3: no such stage of recipe llava; known are 1, 2"),
        ("--recipe llava", "stages read different packs; name one: --stage 1 or 2"),
        ("--stage 4", "--stage 4: no such stage of recipe internvl"),
    ],
)
def test_a_stage_that_is_not_there_is_refused(
    arguments: list[str], given: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*arguments, *given.split()])
    assert told in capsys.readouterr().err
