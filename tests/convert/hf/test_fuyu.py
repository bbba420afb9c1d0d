"""Fuyu models, there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, FuyuForCausalLM
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from megavlm.config.cli import parse
from megavlm.config.recipes.fuyu import ARCHITECTURE
from megavlm.convert.hf import convert
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.tables import name_on_disk
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown
from megavlm.data.text.tokenizer import load_tokenizer
from megavlm.planner.flops import pieces
from tests.convert.card import run_example
from tests.convert.fuyu_models import KINDS, SMALL, make_fuyu
from tests.convert.part_folders import make_fuyu_tokenizer
from tests.convert.round_trip import assert_round_trip
from tests.data.text.test_fuyu import cut_tensor


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    make_fuyu_tokenizer(folder)
    return folder


def image_token(words: Path) -> int:
    return load_tokenizer(words).convert_tokens_to_ids("|SPEAKER|")


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    source = make_fuyu(tmp_path / "hf", KINDS[kind], image_token_id=image_token(words))
    tensors = assert_round_trip(source, tmp_path, words, KINDS[kind], "fuyu", name_on_disk)
    assert "vision_embed_tokens.bias" in tensors


def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(FuyuImageProcessorPil, "patchify_image", cut_tensor)
    source = make_fuyu(tmp_path / "hf", image_token_id=image_token(words))
    image_processor = {"size": {"height": 18, "width": 24}, "image_mean": 0.5, "image_std": 0.5}
    write_json(source / "preprocessor_config.json", image_processor)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = FuyuForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()) and model.dtype == torch.float32
    expected = FuyuForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(out)
    assert dict(processor.image_processor.size) == {"height": 18, "width": 24}
    assert dict(processor.image_processor.patch_size) == {"height": 6, "width": 6}
    inputs = processor(
        images=Image.new("RGB", (20, 8)),
        text="what is it\n",
        return_tensors="pt",
        return_legacy_image_output=False,
    )
    template = ChatTemplate(load_tokenizer(out), 1, name="fuyu")
    asked = template.prompt("what is it", [4 * 2], [Shown(4 * 2, rows=2)])
    assert inputs["input_ids"][0].tolist() == asked.tolist()
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    assert run_example(out, monkeypatch, capsys)
    card = (out / "README.md").read_text()
    assert "as many as cover it, up to 24 x 18 pixels" in card and "| vision |" not in card


def test_a_flat_config_as_published_is_read(tmp_path: Path) -> None:
    source = make_fuyu(tmp_path / "hf")
    settings = read_json(source / "config.json")
    inside = settings.pop("text_config")
    base = inside.pop("rope_parameters")["rope_theta"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "max_position_embeddings", "layer_norm_eps", "hidden_act")
    settings |= {name: inside[name] for name in (*names, "qk_layernorm")} | {"rope_theta": base}
    write_json(source / "config.json", settings)
    assert architecture_from_hf(source) == SMALL


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("", {"num_channels": 4}, "num_channels is 4, must be 3"),
        ("text_config", {"model_type": "llama"}, "model_type is 'llama', must be 'persimmon'"),
        ("text_config", {"qk_layernorm": False}, "qk_layernorm is False, must be True"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, section: str, change: dict, told: str) -> None:
    source = make_fuyu(tmp_path / "hf")
    settings = read_json(source / "config.json")
    inside = settings[section] if section else settings
    inside |= change
    write_json(source / "config.json", settings)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)


def test_a_tokenizer_that_the_processor_reads_otherwise_is_refused(tmp_path: Path) -> None:
    from tests.data.text.test_templates import sentences

    tokenizer = sentences(tmp_path, "LlamaTokenizer", starts_with_space=True)
    tokenizer.add_tokens(["|SPEAKER|", "|NEWLINE|", "<0x04>", "|ENDOFTEXT|"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "llama")
    source = make_fuyu(tmp_path / "hf")
    checkpoint = convert.import_(source, tmp_path / "checkpoint", tokenizer=tmp_path / "llama")
    with pytest.raises(ValueError, match="puts no space in front of a text that begins with"):
        convert.export(checkpoint, tmp_path / "out")


def test_the_model_of_the_recipe_is_fuyu_8b() -> None:
    total = sum(piece.elements for piece in pieces(ARCHITECTURE))
    # 36 layers of Persimmon, two tables of its vocabulary, the last norm, the patches' matrix.
    layer = 4 * 4096**2 + 4 * 4096 + 2 * 4096 * 16384 + 16384 + 4096 + 4 * 4096 + 4 * 64
    assert total == 36 * layer + 2 * 262144 * 4096 + 2 * 4096 + 2701 * 4096
    assert ARCHITECTURE.placeholders_per_tile == 1


def test_the_stage_asks_for_packs_of_patches() -> None:
    config = parse(["--recipe", "fuyu", "--stage", "1"])
    assert config.architecture == ARCHITECTURE
    assert (config.data.template, config.data.tiling) == (("fuyu",), "patches")
    assert config.training.trainable == ("connector", "language")
    assert dataclasses.asdict(config.architecture.vision)["num_layers"] == 0
