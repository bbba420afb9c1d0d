"""InstructBLIP models, there and back, and a processor that makes the tokens of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

from megavlm.convert.hf import check_files, convert
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER, load_tokenizer
from tests.convert.blip2_models import INSTRUCT, INSTRUCT_KINDS, KINDS, make_instructblip, reading
from tests.convert.card import run_example
from tests.convert.round_trip import assert_round_trip, golden_words
from tests.data.pair_tokenizer import make_pair_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    golden_words(folder, "llava")
    make_pair_tokenizer(folder / QFORMER_TOKENIZER, ("what", "is", "it", "a", "cat"))
    return folder


@pytest.mark.parametrize("kind", INSTRUCT_KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    architecture = INSTRUCT_KINDS[kind]
    source = make_instructblip(tmp_path / "hf", architecture)
    names = assert_round_trip(source, tmp_path, words, architecture, "instructblip")
    assert "qformer.embeddings.word_embeddings.weight" in names


def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = make_instructblip(tmp_path / "hf")
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = InstructBlipForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    assert not any(file.changes or file.note for file in check_files.check_files(out))
    template = ChatTemplate(
        load_tokenizer(words),
        INSTRUCT.features_per_tile,
        name="instructblip",
        qformer_tokenizer=load_tokenizer(words / QFORMER_TOKENIZER),
    )
    processor = AutoProcessor.from_pretrained(out)
    pixels = torch.zeros(3, 16, 30, dtype=torch.uint8)
    text = "What is it?"
    inputs = processor(images=pixels, text=text, return_tensors="pt")
    turns = [Turn(role="human", text=f"<image>\n{text}"), Turn(role="gpt", text="a cat")]
    tokens, supervised = template.encode(turns, [1])
    found = inputs["input_ids"][0].tolist()
    assert tokens[: len(found)].tolist() == found == template.prompt(turns[:1], [1]).tolist()
    assert supervised.tolist() == [False] * len(found) + [True] * (len(tokens) - len(found))
    assert inputs["qformer_input_ids"][0].tolist() == template.instruction(turns, [1]).tolist()
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert run_example(out, monkeypatch, capsys)


def test_how_long_instructions_are_is_no_fact_of_a_folder(tmp_path: Path) -> None:
    source = make_instructblip(tmp_path / "hf")
    there = architecture_from_hf(source)
    assert not differences(there, reading(INSTRUCT, 9))
    [one] = differences(there, KINDS["llama"])
    assert one == "--architecture.connector.qformer.text: True there, False asked for"


def test_a_tokenizer_without_that_of_the_q_former_is_refused(tmp_path: Path, words: Path) -> None:
    start = convert.import_(make_instructblip(tmp_path / "hf"), tmp_path / "start", tokenizer=words)
    golden_words(tmp_path / "alone", "llava")
    with pytest.raises(ValueError, match="has the tokenizer of its Q-Former in qformer_tokenizer/"):
        convert.export(start, tmp_path / "out", tokenizer=tmp_path / "alone")
    with pytest.raises(ValueError, match="--vision .* has no effect, since files of --dialect in"):
        convert.export(start, tmp_path / "out", vision=tmp_path)
