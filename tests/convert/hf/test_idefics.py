"""IDEFICS models, there and back, and their processor beside the templates of Flamingo."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, IdeficsForVisionText2Text

from megavlm.convert.hf import convert
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.tables import rows
from megavlm.data.packing.shorten import cut_windows
from megavlm.data.packing.windows import Windows
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image as SampleImage
from megavlm.data.sample import Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown
from megavlm.data.text.tokenizer import AROUND_IMAGE, load_tokenizer
from tests.convert.card import counted_parts, run_example
from tests.convert.idefics_models import FLAMINGO, KINDS, make_idefics
from tests.convert.round_trip import assert_round_trip, golden_words


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    assert golden_words(folder, "idefics") == 2
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    source = make_idefics(tmp_path / "hf", KINDS[kind])
    assert_round_trip(source, tmp_path, words, KINDS[kind], "flamingo")


def test_transformers_loads_an_export_and_its_processor_makes_the_tokens_of_training(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    source = make_idefics(tmp_path / "hf")
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = IdeficsForVisionText2Text.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(out)
    template = ChatTemplate(load_tokenizer(words), 1, name="flamingo")
    image = Image.new("RGB", (20, 10))
    prompt = [image, "What is it? Answer: a cat</s>", image, image, "And these? Answer:"]
    inputs = processor(text=[prompt], return_tensors="pt")
    turns = [
        Turn(role="human", text="<image>What is it?"),
        Turn(role="gpt", text="a cat"),
        Turn(role="human", text="<image><image>And these?"),
    ]
    found = template.prompt(turns, [1, 1, 1])
    assert found.tolist() == inputs["input_ids"][0].tolist()
    assert template.count([*turns, Turn(role="gpt", text="dogs")], [1, 1, 1]) > len(found)
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] == len(found) + 3
    assert '"What is it? Answer: a cat</s>"' in (out / "README.md").read_text()
    assert run_example(out, monkeypatch, capsys)
    vision = sum(tensor.numel() for tensor in model.model.vision_model.parameters())
    connector = sum(tensor.numel() for tensor in model.model.perceiver_resampler.parameters())
    total = sum(tensor.numel() for tensor in model.parameters())
    language = total - vision - connector
    parts = dict(vision=vision, connector=connector, language=language)
    assert counted_parts(out) == parts


def test_images_are_never_learned_and_documents_end(words: Path) -> None:
    template = ChatTemplate(load_tokenizer(words), 1, name="flamingo_plain")
    text = "A cat. <image> A dog.<image><image>"
    tokens, supervised = template.encode([Turn(role="pretrain", text=text)], [1, 1, 1])
    tokenizer = template.tokenizer
    special = set(tokenizer.convert_tokens_to_ids([AROUND_IMAGE, "<image>"]))
    assert {int(token) for token, one in zip(tokens, supervised, strict=True) if not one} == {
        tokenizer.bos_token_id,
        *special,
    }
    assert tokens[-1] == tokenizer.eos_token_id
    # Two images side by side share the token between them.
    around, image = (tokenizer.convert_tokens_to_ids(one) for one in (AROUND_IMAGE, "<image>"))
    assert tokens[-6:-1].tolist() == [around, image, around, image, around]
    caption, learned = template.encode(
        [Turn(role="human", text="<image>\nWhat is it?"), Turn(role="gpt", text="a cat")], [1]
    )
    assert learned.sum() > 1 and not learned[:4].any()
    assert "What" not in tokenizer.decode(caption)


@pytest.fixture(scope="module")
def chunk_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer with the token that ends a chunk."""
    folder = tmp_path_factory.mktemp("chunk_words")
    assert golden_words(folder, "openflamingo") == 3
    return folder


def test_chunks_end_and_documents_are_learned_from_their_first_image_on(chunk_words: Path) -> None:
    template = ChatTemplate(load_tokenizer(chunk_words), 1, name="flamingo_chunks_plain")
    image = f"{AROUND_IMAGE}<image>{AROUND_IMAGE}"
    two = f"{AROUND_IMAGE}<image>{AROUND_IMAGE}<image>{AROUND_IMAGE}"
    text = "A page. <image>\nA dog. <image> <image>Two cats. <image>"
    turn = Turn(role="pretrain", text=text)
    tokens, supervised = template.encode([turn], [1] * 4)
    end = "<|endofchunk|>"
    whole = f"<s> A page.{image}A dog.{end}{two}Two cats.{end}{image}{end}</s>"
    expected = template.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokens.tolist() == expected == template.tokenizer(whole[3:])["input_ids"]
    assert template.count([turn], [1] * 4) == len(tokens)
    learned = template.tokenizer.decode(tokens[supervised])
    wanted = f"A dog.{end}Two cats.{end}{end}</s>"
    assert learned.replace(" ", "") == wanted.replace(" ", "")
    no_image, learned = template.encode([Turn(role="pretrain", text="A page.")], [])
    assert learned[1:].all() and template.tokenizer.decode(no_image[-2:]) == f"{end}</s>"
    turns = [
        Turn(role="human", text="<image>\nWhat is it?"),
        Turn(role="gpt", text="a cat"),
        Turn(role="human", text="<image>\nAnd this?"),
        Turn(role="gpt", text="a dog"),
    ]
    shots, _ = template.encode(turns, [1, 1])
    found = template.tokenizer(f"{image}a cat{end}{image}a dog{end}")["input_ids"]
    assert shots.tolist() == found
    with pytest.raises(RejectError, match="a pretrain turn holds <.endofchunk.> 1 times"):
        template.encode([Turn(role="pretrain", text=f"a {end} b")], [])


def test_windows_are_learned_from_their_first_image_on(chunk_words: Path) -> None:
    template = ChatTemplate(load_tokenizer(chunk_words), 1, name="flamingo_chunks_plain")
    turn = Turn(role="pretrain", text="One. <image>Two, three, four, five. <image>Six.")
    tokens, supervised = template.encode([turn], [1, 1])
    still = SampleImage(encoded=b"", width=1, height=1, columns=1, rows=1, tiles=1)
    whole = Sample(tokens=tokens, supervised=supervised, images=(still,) * 2, source=0, line=1)
    places = np.flatnonzero(tokens == template.context_token_id)
    # The second window begins between the images.
    size = int(places[0]) + 5
    first, second, *others = cut_windows(whole, Windows(tokens=size), template, [Shown(1)] * 2)
    assert [len(one.images) for one in (first, second, *others)].count(1) == 2
    for one in (first, second, *others):
        shown = np.flatnonzero(one.tokens == template.context_token_id)
        assert one.images and one.supervised.any()
        assert not one.supervised[: shown[0] + 1].any()


def test_a_model_with_the_token_that_ends_a_chunk_goes_there_and_back(
    tmp_path: Path,
    chunk_words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    size = len(load_tokenizer(chunk_words))
    architecture = dataclasses.replace(
        FLAMINGO,
        language=dataclasses.replace(FLAMINGO.language, vocab_size=size),
        added_tokens=3,
        image_tokens="openflamingo",
    )
    source = make_idefics(tmp_path / "hf", architecture)
    shutil.copytree(chunk_words, source, dirs_exist_ok=True)
    tensors = assert_round_trip(source, tmp_path, source, architecture, "flamingo")
    assert len(tensors["lm_head.additional_fc.weight"]) == 3
    out = tmp_path / "out"
    assert architecture_from_hf(out) == architecture
    template = ChatTemplate(load_tokenizer(out), 1, name="flamingo_chunks")
    end = template.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    model = IdeficsForVisionText2Text.from_pretrained(out)
    assert model.generation_config.eos_token_id == end >= model.config.vocab_size
    assert model.config.eos_token_id == template.tokenizer.eos_token_id
    turns = [
        Turn(role="human", text="<image>What is it?"),
        Turn(role="gpt", text="a cat"),
        Turn(role="human", text="<image>And this?"),
    ]
    image = Image.new("RGB", (20, 10))
    prompt = [image, "What is it? Answer: a cat<|endofchunk|>", image, "And this? Answer:"]
    inputs = AutoProcessor.from_pretrained(out)(text=[prompt], return_tensors="pt")
    assert template.prompt(turns, [1, 1]).tolist() == inputs["input_ids"][0].tolist()
    assert '"What is it? Answer: a cat<|endofchunk|>"' in (out / "README.md").read_text()
    assert run_example(out, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(language=dict(num_query_groups=2)), "keys and values for each query head"),
        (dict(language=dict(family="qwen2", qkv_bias=True)), "family llama; this model has qwen2"),
        (dict(language=dict(num_layers=3)), "divides"),
        (dict(vision=dict(family="siglip")), "vision.family clip"),
        (dict(image_tokens="llava"), "image_tokens idefics"),
    ],
)
def test_what_the_class_cannot_hold_is_refused_with_the_reason(change: dict, reason: str) -> None:
    changed = {
        name: dataclasses.replace(getattr(FLAMINGO, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in change.items()
    }
    architecture = dataclasses.replace(FLAMINGO, **changed)
    with pytest.raises(ValueError, match=f"{reason}.*stays in checkpoints"):
        rows(architecture, "idefics")
    with pytest.raises(ValueError, match="Llava.*.cross_attention.every 0; this"):
        rows(architecture, "llava")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_resampler": False}, "use_resampler is False, must be True"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix'"),
        ({"cross_layer_interval": 3}, "cross_layer_interval is 3, must divide"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path: Path, settings: dict, reason: str) -> None:
    folder = make_idefics(tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=reason):
        architecture_from_hf(folder)
