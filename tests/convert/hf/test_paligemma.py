"""PaliGemma models, there and back, and from their parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from megavlm.config.cli import parse
from megavlm.config.recipes.paligemma import ARCHITECTURE
from megavlm.config.schema import Config, Init, Training
from megavlm.convert.hf import convert, from_parts
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.tables import llava_name_on_disk, rows
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.model_source import read_model
from megavlm.planner.flops import pieces
from tests.convert.card import run_example
from tests.convert.models import load_all
from tests.convert.paligemma_models import KINDS, SMALL, make_paligemma
from tests.convert.part_folders import make_gemma, make_gemma_tokenizer, make_vision
from tests.convert.round_trip import assert_round_trip

# As many rows as the tokenizer has ids.
ROWS = 259 + 1024 + 128 + 1
WORDY = dataclasses.replace(
    SMALL, language=dataclasses.replace(SMALL.language, vocab_size=ROWS + 2)
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    make_gemma_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    add_special_tokens(tokenizer, "paligemma")
    assert max(tokenizer.get_vocab().values()) == ROWS - 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    language = dataclasses.replace(KINDS[kind].language, vocab_size=ROWS + 2)
    architecture = dataclasses.replace(KINDS[kind], language=language)
    source = make_paligemma(tmp_path / "hf", architecture, image_token_id=ROWS - 1)
    tensors = assert_round_trip(
        source, tmp_path, words, architecture, "paligemma", llava_name_on_disk
    )
    assert ("language_model.lm_head.weight" in tensors) == (kind == "untied")


def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = make_paligemma(tmp_path / "hf", WORDY, image_token_id=ROWS - 1)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = PaliGemmaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    expected = expected.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(out)
    pixels = np.full((10, 30, 3), 200, np.uint8)
    inputs = processor(images=pixels, text="<image>what is it", return_tensors="pt")
    template = ChatTemplate(load_tokenizer(out), SMALL.features_per_tile, name="paligemma")
    assert inputs["input_ids"][0].tolist() == template.prompt("what is it", [1]).tolist()
    assert torch.allclose(inputs["pixel_values"], torch.tensor(200 / 255 * 2 - 1))
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    assert run_example(out, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("", {"image_token_index": 2000}, "must have a row for it"),
        ("vision_config", {"vision_use_head": True}, "vision_use_head is True, must be False"),
        ("text_config", {"use_bidirectional_attention": False}, "prefixes are bidirectional"),
        ("text_config", {"model_type": "qwen2"}, r"must be 'gemma' \(PaliGemma\) or 'gemma2'"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, section: str, change: dict, told: str) -> None:
    source = make_paligemma(tmp_path / "hf")
    settings = read_json(source / "config.json")
    inside = settings[section] if section else settings
    inside |= change
    write_json(source / "config.json", settings)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)


def test_the_model_of_the_recipe_is_paligemma_3b() -> None:
    counts = dict.fromkeys(("vision", "connector", "language", "head"), 0)
    for piece in pieces(ARCHITECTURE):
        counts[piece.part] += piece.elements
    # SigLIP So400m without its head; Gemma 2B with 1216 more rows.
    assert counts["vision"] == 412_442_352
    assert counts["connector"] == 1152 * 2048 + 2048
    assert counts["language"] + counts["head"] == 2_506_172_416 + 1216 * 2048
    assert ARCHITECTURE.placeholders_per_tile == 256


@pytest.mark.parametrize(
    ("name", "total"),
    # As Keras Hub counts them for 257152 tokens (3032094960, 9662409456 and 27650192112), and 64
    # rows more, as of transformers' folders.
    [
        ("paligemma2-3b", 3_032_242_416),
        ("paligemma2-10b", 9_662_638_832),
        ("paligemma2-28b", 27_650_487_024),
    ],
)
def test_the_models_of_the_table_are_paligemma_2(name: str, total: int) -> None:
    architecture = parse(["--recipe", "paligemma", "--stage", "1", "--model", name]).architecture
    assert sum(piece.elements for piece in pieces(architecture)) == total
    assert architecture.placeholders_per_tile == 256


@pytest.mark.parametrize(
    ("stage", "size", "tokens"), [("1", 224, 256), ("2", 448, 1024), ("2.5", 896, 4096)]
)
def test_stages_have_their_resolutions(stage: str, size: int, tokens: int) -> None:
    config = parse(["--recipe", "paligemma", "--stage", stage])
    assert config.architecture.vision.image_size == size
    assert config.architecture.placeholders_per_tile == tokens
    assert config.data.loss_reduction == "sample" and config.data.tiling == "stretch"
    config = parse(
        ["--recipe", "paligemma", "--stage", stage, "--architecture.vision.image_size", "14"]
    )
    assert config.architecture.vision.image_size == 14


def test_parts_are_siglip_to_its_last_norm_and_gemma(tmp_path: Path) -> None:
    vision = make_vision(tmp_path / "siglip", "siglip")
    words = make_gemma(tmp_path / "gemma")
    init = Init(vision=str(vision), language=str(words))
    found = read_model("", init, ARCHITECTURE)
    assert (found.vision.num_layers, found.vision.unused_layers) == (3, 0)
    assert found.vision.final_norm and found.prefix_lm and found.language.tied_head
    assert found.language.vocab_size == ROWS
    config = Config(stage="1", model="parts", architecture=found, init=init, training=Training())
    drawn: list[str] = []

    def fresh(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn.append(key)
        return torch.zeros(shape)

    tensors = from_parts.full_tensors(config, fresh)
    theirs = load_all(vision)
    for row in rows(found, "paligemma"):
        tensors(row.key, row.shape)[(slice(None),)]
    assert drawn == ["connector.linear.weight", "connector.linear.bias"]
    last = tensors("vision.final_norm.weight", (24,))[(slice(None),)]
    [name] = [name for name in theirs if name.endswith("post_layernorm.weight")]
    assert torch.equal(last, theirs[name])
