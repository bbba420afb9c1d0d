"""LLaVA-NeXT models, there and back, and in the hands of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from megavlm.config.models import MODELS
from megavlm.config.recipes.llava_next import RECIPE
from megavlm.config.schema import Architecture
from megavlm.config.tiling import NOTHING_STATED
from megavlm.convert.hf import convert, llava_next_config, preprocessing
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.reference import refuse_other_tiles
from megavlm.convert.weights.tables import llava_name_on_disk, rows, unused_rows
from megavlm.data.images.anyres import LLAVA_GRIDS
from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.packing.settings import Job
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from megavlm.evaluate.by_transformers import answer_tasks
from megavlm.model_source import stated_tiles
from megavlm.planner.flops import pieces
from tests.convert.card import run_example
from tests.convert.llava_models import make_llava
from tests.convert.llava_next_models import (
    KINDS,
    SIZES,
    SMALL,
    make_anyres_packs,
    make_image,
    make_llava_next,
)
from tests.convert.models import ids_with, load_all
from tests.convert.round_trip import assert_round_trip
from tests.convert.tool import run_tool
from tests.ranks.model_checks import sizes_of

SEEING = dataclasses.replace(
    KINDS["siglip with its head, no biases in the connector"], language=SMALL.language
)


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    grids = ((3, 2), (1, 2))
    source = make_llava_next(tmp_path / "hf", KINDS[kind], grids=grids)
    tensors = assert_round_trip(
        source, tmp_path, words, KINDS[kind], "llava_next", llava_name_on_disk
    )
    assert tensors["image_newline"].shape == (48,)
    assert hub_format_of(tmp_path / "out").read_usage(tmp_path / "out").grids == grids
    assert preprocessing.of_checkpoint(tmp_path / "checkpoint").grids == grids
    checked = convert.check(source)
    assert not any(part.changed for part in checked)
    assert sum(part.tensors for part in checked) == len(tensors)


@pytest.mark.parametrize("architecture", [SMALL, SEEING], ids=["clip", "siglip"])
def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    architecture: Architecture,
) -> None:
    source = make_llava_next(tmp_path / "hf", architecture)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = LlavaNextForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    expected = expected.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(out)
    processor.image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text.endswith("USER: <image>\nwhat is it ASSISTANT:")
    template = ChatTemplate(load_tokenizer(out), architecture.features_per_tile, name="llava_v1")
    layout = feature_layout("anyres", architecture.features_per_tile)
    rng = np.random.default_rng(2)
    for size in SIZES:
        stored = make_image(rng, size, architecture.vision.image_size)
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        inputs = processor(images=picture, text=text, return_tensors="pt")
        tokens = template.prompt("what is it", *sizes_in_text([stored], layout))
        context = template.context_token_id
        count = int((inputs["input_ids"] == context).sum())
        assert count == int((tokens == context).sum()) == layout.count(stored)
        assert inputs["pixel_values"].shape[1] == stored.tiles
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert made.shape[1] > inputs["input_ids"].shape[1]
    assert run_example(out, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_grid_pinpoints": [[16, 24]]}, "must be multiples of vision_config.image_size 16"),
        ({"image_grid_pinpoints": []}, "must be multiples"),
        ({"image_grid_pinpoints": [32, 16]}, "pairs of height and width"),
        ({"image_grid_pinpoints": [[32, 16, 16]]}, "pairs of height and width"),
        ({"image_grid_pinpoints": [["32", "16"]]}, "pairs of height and width"),
        ({"image_grid_pinpoints": [[-16, 16]]}, "must be multiples"),
        ({"image_grid_pinpoints": [[0, 16]]}, "must be multiples"),
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
        ({"text_config": None}, "LLaVA's own code"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    source = make_llava_next(tmp_path / "hf")
    settings = read_json(source / "config.json") | change
    settings = {name: value for name, value in settings.items() if value is not None}
    write_json(source / "config.json", settings)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)


def test_grids_that_the_image_processor_has_otherwise_are_refused(tmp_path: Path) -> None:
    source = make_llava_next(tmp_path / "hf")
    path = source / "preprocessor_config.json"
    settings = read_json(path)
    write_json(path, settings | {"image_grid_pinpoints": [[32, 16]]})
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json: .*\n.*must be that of config.json"
    ):
        architecture_from_hf(source)
    # transformers then takes those of its own class.
    del settings["image_grid_pinpoints"]
    write_json(path, settings)
    with pytest.raises(ValueError, match=r"is missing, which means \[\[336, 672\]"):
        architecture_from_hf(source)


def test_sizes_that_the_image_processor_has_otherwise_are_refused(tmp_path: Path) -> None:
    source = make_llava_next(tmp_path / "hf")
    path = source / "preprocessor_config.json"
    settings = read_json(path)
    tile = {"height": 16, "width": 16}
    write_json(path, settings | {"size": {"shortest_edge": 16}, "crop_size": tile})
    assert architecture_from_hf(source) == SMALL
    for changes, told in (
        ({"crop_size": tile}, "size is missing beside crop_size"),
        ({"size": {"shortest_edge": 20}, "crop_size": tile}, "size is .* image_size 16 of config"),
    ):
        write_json(path, settings | changes)
        with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*\n.*{told}"):
            architecture_from_hf(source)


@pytest.mark.parametrize("given", ["", "4x1"])
def test_packs_have_the_grids_of_the_model(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    folder = make_llava_next(tmp_path / "hf", grids=((1, 2), (3, 1)))
    jobs: list[Job] = []

    def stop(job: Job) -> None:
        jobs.append(job)
        raise ValueError

    monkeypatch.setattr("megavlm.data.packing.job.pack_dataset", stop)
    records = tmp_path / "records.jsonl"
    records.write_text("{}")
    files = ["--jsonl", str(records), "--tokenizer", str(words), "--out", str(tmp_path / "out")]
    form = ["--model", str(folder), "--tiling", "anyres", "--template", "llava_v1"]
    form += ["--grids", given] if given else []
    assert run_tool(*files, *form, tool="pack_dataset") == 2
    [job] = jobs
    assert job.tiling.grids == (((4, 1),) if given else ((1, 2), (3, 1)))
    assert stated_tiles("llava-v1.6-vicuna-7b") == stated_tiles(None) == NOTHING_STATED


def test_transformers_is_given_packs_of_its_tiles_alone(tmp_path: Path) -> None:
    facts = sizes_of(SMALL)
    packs = make_anyres_packs(tmp_path / "packs", 1, 288, **facts)
    model = make_llava_next(tmp_path / "hf")
    refuse_other_tiles("--data", packs, model)
    plain = make_llava(tmp_path / "plain")
    for folder, changes, told in (
        (model, dict(grids=LLAVA_GRIDS[1:]), "--grids 1x2,2x2,1x3,3x1, and .* --grids 2x1,1x2,"),
        (model, dict(grids=(), tiling="crop"), "--tiling crop, and .* makes a grid of tiles of"),
        (model, dict(image_size=32), "tiles of 32 pixels a side, and the model's have 16"),
        (model, dict(features_per_tile=1), "tiles of 1 image tokens, and the model's have 16"),
        (plain, {}, "--grids 2x1,1x2,2x2,1x3,3x1, and .* makes other tiles"),
    ):
        dataclasses.replace(packs, **changes).write(tmp_path / "packs")
        with pytest.raises(ValueError, match=f"--packs .*{told}"):
            answer_tasks(folder, (), tmp_path / "packs", tmp_path / "out", max_new_tokens=1)
    no_images = dataclasses.replace(packs.totals, tiles=0)
    refuse_other_tiles("--data", dataclasses.replace(packs, grids=(), totals=no_images), model)


def test_llava_holds_no_newlines_and_the_other_way_round(tmp_path: Path, words: Path) -> None:
    start = convert.import_(make_llava_next(tmp_path / "hf"), tmp_path / "a", tokenizer=words)
    with pytest.raises(ValueError, match="Llava.*.newline false; this model has true"):
        convert.export(start, tmp_path / "out", dialect="llava")
    assert "image_newline" in load_all(tmp_path / "hf") | load_all(
        convert.export(start, tmp_path / "again")
    )
    settings = start / "config.yaml"
    settings.write_text(settings.read_text().replace("newline: true", "newline: false"))
    with pytest.raises(ValueError, match="newline true; this model has false"):
        convert.export(start, tmp_path / "other", dialect="llava_next")


def test_presets_are_the_published_models() -> None:
    # Sizes of the language models: https://huggingface.co/llava-hf.
    expected = {
        "llava-v1.6-vicuna-7b": 6_738_939_904,
        "llava-v1.6-vicuna-13b": 13_016_519_680,
        "llava-v1.6-mistral-7b": 7_242_256_384,
    }
    for name, language in expected.items():
        architecture = MODELS[name]
        counts = {part: 0 for part in ("vision", "connector", "language", "head")}
        for piece in pieces(architecture):
            counts[piece.part] += piece.elements
        assert counts["language"] + counts["head"] == language, name
        width = architecture.language.hidden_size
        assert counts["connector"] == (1024 + 1) * width + (width + 1) * width + width
        assert architecture.features_per_tile == 576
        settings = llava_next_config.write(
            architecture, LLAVA_GRIDS, ids_with(32000), torch.float16
        )
        with torch.device("meta"):
            model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(settings))
        expected_shapes = {
            llava_name_on_disk(key): tuple(tensor.shape)
            for key, tensor in model.state_dict().items()
        }
        table = rows(architecture, "llava_next")
        found = {
            key: shape
            for row in table
            for key, shape in zip(row.names, row.part_shapes, strict=True)
        }
        found |= {row.names[0]: row.shape for row in unused_rows(architecture, "llava_next")}
        assert found == expected_shapes, name
    assert LlavaNextConfig().image_grid_pinpoints == llava_next_config.pinpoints(LLAVA_GRIDS, 336)
    assert [row.optimizer.lr for row in RECIPE.stages.values()] == [1e-3, 1e-5]
    assert dataclasses.asdict(RECIPE.stages["2"].optimizer)["lr_multipliers"] == ("vision=0.2",)
