"""PaliGemma's samples against the processor of ``transformers``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PaliGemmaProcessor, SiglipImageProcessor

from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from tests.convert.part_folders import make_gemma_tokenizer, make_tokenizer

FEATURES = 16


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("words")
    make_gemma_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    assert add_special_tokens(tokenizer, "paligemma") == 1024 + 128 + 1
    return ChatTemplate(tokenizer, FEATURES, name="paligemma")


@pytest.fixture(scope="module")
def processor(template: ChatTemplate) -> PaliGemmaProcessor:
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = FEATURES
    return PaliGemmaProcessor(images, template.tokenizer)


def turns(question: str, answer: str) -> list[Turn]:
    return [Turn(role="human", text=question), Turn(role="gpt", text=answer)]


@pytest.mark.parametrize(
    ("question", "images", "prefix", "answer"),
    [
        ("<image>\ncaption en", 1, "caption en", "a cow on a bench"),
        ("detect cow ; dog\n<image>", 1, "detect cow ; dog", "<loc0012><loc1023> cow"),
        ("segment <image> cow", 1, "segment cow", "<loc0001><seg127> cow"),
        ("<image><image>\n do both agree? ", 2, "do both agree?", " yes "),
        ("Frame-1: <image>\nFrame-2: <image>\nwhat runs?", 2, "what runs?", "a fox"),
    ],
)
def test_tokens_and_mask_are_those_of_the_processor(
    template: ChatTemplate,
    processor: PaliGemmaProcessor,
    question: str,
    images: int,
    prefix: str,
    answer: str,
) -> None:
    tokens, supervised = template.encode(turns(question, answer), [1] * images)
    pixels = [Image.new("RGB", (20, 10)) for _ in range(images)]
    text = "<image>" * images + prefix
    theirs = processor(images=[pixels], text=[text], suffix=[answer.strip()], return_tensors="np")
    assert tokens.tolist() == theirs["input_ids"][0].tolist()
    assert supervised.tolist() == (theirs["token_type_ids"][0] == 1).tolist()
    assert np.array_equal(np.where(supervised, tokens, -100), theirs["labels"][0])
    assert template.count(turns(question, answer), [1] * images) == len(tokens)
    prompt = template.prompt(question, [1] * images)
    asked = processor(images=[pixels], text=[text], return_tensors="np")["input_ids"][0]
    assert prompt.tolist() == asked.tolist() == tokens[: len(prompt)].tolist()
    assert template.text(tokens[len(prompt) :]) == answer.strip()


def test_a_text_without_an_image_begins_with_bos(template: ChatTemplate) -> None:
    tokens, supervised = template.encode(turns("2 + 2", "4"), [])
    tokenizer = template.tokenizer
    expected = tokenizer("2 + 2\n4", add_special_tokens=False)["input_ids"]
    assert tokens.tolist() == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
    assert supervised.sum() == 2


def test_several_questions_are_refused(template: ChatTemplate) -> None:
    for method in (template.encode, template.count):
        with pytest.raises(RejectError, match="2 questions .* paligemma has one"):
            method([*turns("a", "b"), *turns("c", "d")], [])
        with pytest.raises(RejectError, match="1 system turns, .* has one question alone"):
            method([Turn(role="system", text="Be brief."), *turns("a", "b")], [])


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, ("<eos>",))
    tokenizer = load_tokenizer(tmp_path)
    add_special_tokens(tokenizer, "paligemma")
    with pytest.raises(ValueError, match="no bos_token, which --template paligemma needs"):
        ChatTemplate(tokenizer, FEATURES, name="paligemma")
