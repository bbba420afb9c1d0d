"""LLaVA models, there and back: every tensor returns, those that no model here uses included."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.config.connectors import LLAVA
from megavlm.config.schema import Architecture
from megavlm.convert.hf import convert, llava_processor, unused_weights
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.vision_part import vision_from_hf
from megavlm.convert.weights.families import clip
from megavlm.convert.weights.tables import llava_name_on_disk
from megavlm.data.images.tiling import pad_colour
from megavlm.data.images.transforms import decode_changed
from megavlm.planner.flops import pieces
from tests.convert.card import run_example
from tests.convert.llava_models import KINDS, SIGLIP, SMALL, make_llava
from tests.convert.models import GEMMA, load_all
from tests.convert.round_trip import assert_round_trip


def renamed(folder: Path, out: Path, change) -> Path:
    """Write a folder again with other names of its weights."""
    out.mkdir()
    save_file(
        {change(name): tensor for name, tensor in load_all(folder).items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    for name in ("config.json", "preprocessor_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


SEEING = SIGLIP["siglip with its head, no biases in the connector"]
KINDS = (
    KINDS
    | SIGLIP
    | {
        "gemma tied": dataclasses.replace(
            SMALL, language=dataclasses.replace(SMALL.language, **GEMMA, tied_head=True)
        )
    }
)


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    source = make_llava(tmp_path / "hf", KINDS[kind])
    tensors = assert_round_trip(source, tmp_path, words, KINDS[kind], "llava", llava_name_on_disk)
    assert any("post_layernorm" in name for name in tensors)
    assert any("head.probe" in name for name in tensors) == KINDS[kind].vision.unused_head
    checked = convert.check(source)
    assert not any(part.changed for part in checked)
    assert sum(part.tensors for part in checked) == len(tensors)


@pytest.mark.parametrize("form", ["published", "in memory"])
def test_three_forms_of_names_are_read(tmp_path: Path, words: Path, form: str) -> None:
    source = make_llava(tmp_path / "hf")
    changes = {
        "published": lambda name: re.sub(
            r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name
        ),
        "in memory": lambda name: re.sub(
            r"^(vision_tower|multi_modal_projector)",
            r"model.\1",
            name.replace("language_model.model.", "model.language_model.")
            .replace("language_model.lm_head.", "lm_head.")
            .replace("vision_tower.vision_model.", "vision_tower."),
        ),
    }
    other = renamed(source, tmp_path / "other", changes[form])
    assert load_all(other).keys() != load_all(source).keys()
    first = convert.export(
        convert.import_(source, tmp_path / "a", tokenizer=words), tmp_path / "outa"
    )
    second = convert.export(
        convert.import_(other, tmp_path / "b", tokenizer=words), tmp_path / "outb"
    )
    one = load_all(first)
    two = load_all(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("architecture", [SMALL, SEEING], ids=["clip", "siglip"])
def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    architecture: Architecture,
) -> None:
    source = make_llava(tmp_path / "hf", architecture)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    expected = expected.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(out)
    content = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text.endswith("USER: <image>\nwhat is it ASSISTANT:")
    pixels = torch.zeros(3, 16, 30, dtype=torch.uint8)
    inputs = processor(images=pixels, text=text, return_tensors="pt")
    count = int((inputs["input_ids"] == model.config.image_token_index).sum())
    assert count == architecture.features_per_tile == 16
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert run_example(out, monkeypatch, capsys)


@pytest.mark.parametrize("tiling", ["stretch", "pad", "crop"])
def test_an_export_with_siglip_sees_the_pixels_of_training(
    tmp_path: Path, words: Path, tiling: str
) -> None:
    source = make_llava(tmp_path / "hf", SEEING)
    usage = hub_format_of(source).read_usage(source)
    assert usage.tiling == "stretch"
    usage = dataclasses.replace(usage, tiling=tiling)
    out = tmp_path / "out"
    out.mkdir()
    llava_processor.write(out, words, SEEING, usage, torch.float32)
    assert hub_format_of(out).read_usage(out) == usage
    processor = AutoProcessor.from_pretrained(out)
    processor.image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    is_stretched = type(processor.image_processor).__name__.startswith("Siglip")
    assert is_stretched == (tiling == "stretch")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (25, 41, 3), np.uint8))
    inputs = processor(images=image, text="<image>what is it", return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    assert processor._get_num_multimodal_tokens([(25, 41)])["num_image_tokens"] == [16]
    file = io.BytesIO()
    image.save(file, "PNG")
    shape = dict(pad_colour=pad_colour(tiling, SEEING.vision.pixel_mean), crops=tiling == "crop")
    [tile] = decode_changed(file.getvalue(), 1, 1, SEEING.vision.image_size, False, **shape)
    expected = (torch.from_numpy(tile) / 255 - 0.5) / 0.5
    assert (inputs["pixel_values"][0] - expected).abs().max() < 2e-6


def test_a_disk_that_takes_no_unused_weights_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="unused_weights"):
        unused_weights.write({"a": torch.zeros(2)}, tmp_path / "not" / "there")


def test_unused_weights_that_are_lost_are_told_and_can_be_named(
    tmp_path: Path, words: Path
) -> None:
    source = make_llava(tmp_path / "hf")
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    encoder = unused_weights.read(start)
    assert len(encoder) == 16 + 2
    (start / unused_weights.FILE_NAME).unlink()
    with pytest.raises(
        ValueError, match="no unused_weights.safetensors with the 1 layers .*--vision"
    ):
        convert.export(start, tmp_path / "out")
    inside = {
        name.removeprefix("vision_tower."): tensor
        for name, tensor in load_all(source).items()
        if name.startswith("vision_tower.")
    }
    (tmp_path / "clip").mkdir()
    save_file(inside, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    out = convert.export(start, tmp_path / "out", vision=tmp_path / "clip")
    after = load_all(out)
    assert all(
        torch.equal(after[f"vision_tower.vision_model.{name}"], tensor)
        for name, tensor in inside.items()
    )


def test_a_head_can_be_left_out_and_one_that_is_missing_is_told(
    tmp_path: Path, words: Path
) -> None:
    source = make_llava(tmp_path / "hf", SEEING)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    settings = start / "config.yaml"
    text = settings.read_text()
    settings.write_text(text.replace("unused_head: true", "unused_head: false"))
    out = convert.export(start, tmp_path / "out")
    before = {llava_name_on_disk(name): tensor for name, tensor in load_all(source).items()}
    after = load_all(out)
    assert {name for name in before if ".head." not in name} == after.keys() != before.keys()
    assert not architecture_from_hf(out).vision.unused_head
    encoder = {
        name.removeprefix("vision_tower."): tensor
        for name, tensor in after.items()
        if name.startswith("vision_tower.")
    }
    (tmp_path / "siglip").mkdir()
    save_file(encoder, tmp_path / "siglip" / "model.safetensors", {"format": "pt"})
    settings.write_text(text)
    with pytest.raises(ValueError, match="unused_head true: .*siglip has no weights of a head"):
        convert.export(start, tmp_path / "again", vision=tmp_path / "siglip")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vision_config": {"model_type": "vit"}}, "one of clip_vision_model, siglip_vision_model"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be 'full'"),
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
        ({"vision_feature_layer": -9}, "must be one of the 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "must be 'default'"),
        ({"projector_hidden_act": "relu"}, "must be one of gelu, linear"),
        ({"text_config": None}, "LLaVA's own code"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    source = make_llava(tmp_path / "hf")
    settings = read_json(source / "config.json") | change
    settings = {name: value for name, value in settings.items() if value is not None}
    write_json(source / "config.json", settings)
    with pytest.raises(ValueError, match=told) as caught:
        architecture_from_hf(source)
    # An encoder of another kind has settings of its own, which are no mistakes.
    assert "is missing" not in str(caught.value)


def test_a_second_layer_that_is_no_identity_is_refused(tmp_path: Path) -> None:
    source = make_llava(tmp_path / "hf")
    settings = read_json(source / "config.json")
    write_json(source / "config.json", settings | {"projector_hidden_act": "linear"})
    with pytest.raises(ValueError, match="second layer is no identity"):
        convert.import_(source, tmp_path / "start")


def test_every_weight_of_siglip_so400m_is_trained_or_kept(tmp_path: Path) -> None:
    sizes = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
    shape = dict(num_attention_heads=16, image_size=384, patch_size=14)
    settings = SiglipVisionConfig(**sizes, **shape)
    write_json(tmp_path / "config.json", settings.to_dict())
    vision = vision_from_hf(tmp_path)
    assert (vision.num_layers, vision.unused_layers, vision.unused_head) == (26, 1, True)
    assert (vision.pixel_mean, vision.pixel_std) == ((0.5,) * 3, (0.5,) * 3)
    architecture = Architecture(vision=vision, connector=LLAVA, language=SMALL.language)
    assert architecture.features_per_tile == 27**2  # six pixels of each side are left out
    with torch.device("meta"):
        model = SiglipVisionModel(settings)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    trained = {
        name: part
        for row in clip.rows(vision)
        for name, part in zip(row.names, row.part_shapes, strict=True)
    }
    kept = {row.key: row.shape for row in clip.unused_rows(vision)}
    assert trained.keys().isdisjoint(kept) and trained | kept == expected
    counted = sum(piece.elements for piece in pieces(architecture) if piece.part == "vision")
    assert counted == sum(math.prod(part) for part in trained.values()) == 397_745_440


def test_the_preset_is_llava_1_5_7b() -> None:
    from megavlm.config.recipes.llava import ARCHITECTURE, RECIPE

    counts = {part: 0 for part in ("vision", "connector", "language", "head")}
    for piece in pieces(ARCHITECTURE):
        counts[piece.part] += piece.elements
    assert counts["vision"] + 12_596_224 + 2048 == 303_507_456  # CLIP-L/14 of 336 pixels
    assert counts["connector"] == 20_979_712
    assert json.dumps(counts) and ARCHITECTURE.features_per_tile == 576
    assert [row.optimizer.lr for row in RECIPE.stages.values()] == [1e-3, 2e-5]
