"""BLIP-2 models, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from megavlm.convert.hf import convert
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert.blip2_models import KINDS, OPT, make_blip2
from tests.convert.card import run_example
from tests.convert.round_trip import assert_round_trip


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    source = make_blip2(tmp_path / "hf", KINDS[kind])
    assert_round_trip(source, tmp_path, words, KINDS[kind], "blip2")


def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = make_blip2(tmp_path / "hf")
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = Blip2ForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = Blip2ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    expected = expected.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(out)
    pixels = torch.zeros(3, 16, 30, dtype=torch.uint8)
    inputs = processor(images=pixels, text="a red cat", return_tensors="pt")
    template = ChatTemplate(load_tokenizer(words), OPT.features_per_tile, name="blip2")
    turns = [Turn(role="human", text="<image>"), Turn(role="gpt", text="a red cat")]
    tokens, supervised = template.encode(turns, [1])
    found = inputs["input_ids"][0].tolist()
    assert tokens[: len(found)].tolist() == found and len(tokens) > len(found)
    assert found[5] == template.tokenizer.bos_token_id == template.prompt("", [1])[5]
    assert not supervised[:6].any() and supervised[6:].all()
    assert template.count(turns, [1]) == len(tokens)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[0] == 1
    assert run_example(out, monkeypatch, capsys)
