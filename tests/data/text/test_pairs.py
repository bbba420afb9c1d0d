"""Pairs of an image and its text, as CLIP and SigLIP read texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.settings import Job
from megavlm.data.packing.windows import Windows
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.pair_tokenizer import make_pair_tokenizer

WORDS = ("a", "red", "dog")
BEGIN = 4
END = 5


def template(tmp_path: Path, name: str) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(make_pair_tokenizer(tmp_path, WORDS)), 0, name=name)


def turns(text: str) -> list[Turn]:
    return [Turn(role="human", text="<image>\nWhat?"), Turn(role="gpt", text=text)]


def test_a_text_has_the_tokens_of_the_tokenizer_alone(tmp_path: Path) -> None:
    tokens, supervised = template(tmp_path, "clip").encode(turns("A red dog"), [1])
    assert tokens.tolist() == [BEGIN, 0, 1, 2, END] and supervised.all()
    record = [Turn(role="pretrain", text="<image>a dog")]
    assert template(tmp_path, "clip").encode(record, [1])[0].tolist() == [BEGIN, 0, 2, END]


def test_long_texts_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    long = turns("red " * 100)
    tokens, _ = template(tmp_path, "clip").encode(long, [1])
    assert len(tokens) == 77 and tokens[-1] == END and tokens[0] == BEGIN
    # What transformers does with the same text.
    tokenizer = load_tokenizer(tmp_path)
    assert tokens.tolist() == tokenizer("red " * 100, truncation=True, max_length=77)["input_ids"]


def test_texts_are_cut_earlier_by_choice(tmp_path: Path) -> None:
    words = load_tokenizer(make_pair_tokenizer(tmp_path, WORDS))
    short = ChatTemplate(words, 0, name="clip", pair_length=8)
    tokens, _ = short.encode(turns("red " * 100), [1])
    assert tokens.tolist() == [BEGIN, *[1] * 6, END]
    filled = ChatTemplate(words, 0, name="siglip", pair_length=8).encode(turns("a dog"), [1])[0]
    assert tokens.shape == filled.shape == (8,)


def test_internvl_c_asks_for_a_summary_and_ends_a_text(tmp_path: Path) -> None:
    folder = make_pair_tokenizer(tmp_path / "ends", ("a", "dog", "summarize", ":"))
    begin = 5
    end = 6
    expected = [begin, 2, 3, 0, 1, end]
    words = load_tokenizer(folder)
    assert ChatTemplate(words, 0, name="internvl_c").encode(turns("a dog"), [1])[0].tolist() == (
        expected
    )
    words.backend_tokenizer.post_processor = None  # as most language models' have it
    found = ChatTemplate(words, 0, name="internvl_c").encode(turns("a dog"), [1])[0]
    assert found.tolist() == expected[1:]
    long = ChatTemplate(words, 0, name="internvl_c").encode(turns("dog " * 100), [1])[0]
    assert len(long) == 80 and long[-1] == end and long[0] == 2
    with pytest.raises(RejectError, match="the text of the pair is empty"):
        ChatTemplate(words, 0, name="internvl_c").encode(turns(" "), [1])


def test_siglip_fills_texts_up(tmp_path: Path) -> None:
    tokens, supervised = template(tmp_path, "siglip").encode(turns("a dog"), [1])
    tokenizer = load_tokenizer(tmp_path)
    padded = tokenizer("a dog", padding="max_length", max_length=64)["input_ids"]
    assert tokens.tolist() == padded and supervised.all() and tokens.dtype == np.int32
    assert template(tmp_path, "siglip").count(turns("a dog"), [1]) == 64


def test_a_bert_frames_texts_for_blip2(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "dog"]
    whole = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}))
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=frame
    )
    names = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    BertTokenizerFast(tokenizer_object=whole, **names).save_pretrained(tmp_path)
    bert = ChatTemplate(load_tokenizer(tmp_path), 0, name="blip2_pairs")
    tokens, supervised = bert.encode(turns("a red dog"), [1])
    assert tokens.tolist() == [2, 4, 5, 6, 3] and supervised.all()
    tokens, _ = bert.encode(turns("red " * 50), [1])
    assert len(tokens) == 32 and tokens[0] == 2 and tokens[-1] == 3


@pytest.mark.parametrize(
    ("record", "tiles"),
    [
        (turns("a dog"), []),
        (turns("a dog"), [1, 1]),
        (turns("a dog"), [4]),
        ([*turns("a dog"), *turns("a red dog")], [1]),
    ],
)
def test_what_is_no_pair_is_rejected(tmp_path: Path, record: list[Turn], tiles: list[int]) -> None:
    with pytest.raises(RejectError, match="a pair is one image of one tile and one text"):
        template(tmp_path, "clip").encode(record, tiles)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tiling": Tiling(tile_size=32)}, "give --tiling crop, pad or stretch, or --max_tiles 1"),
        ({"alignment": 2}, "--alignment 2: a text of --template clip ends with its last token"),
        ({"features_per_tile": 4}, "--tokens_per_tile 4: must be 0"),
        ({"truncate": 78}, "--truncate 78: texts of --template clip are cut at 2 to 77 tokens"),
        ({"truncate": 1}, "--truncate 1: texts of --template clip are cut at 2 to 77 tokens"),
        ({"windows": Windows(tokens=64)}, "--window_tokens and --window_images out"),
        (
            {"windows": Windows(tokens=64), "template": "fuyu", "features_per_tile": 1},
            "--template fuyu: puts images before the first tokens of a text",
        ),
        (
            {"windows": Windows(images=2), "template": "blip2", "features_per_tile": 4},
            "--template blip2: puts images before .* leave --window_tokens and --window_images out",
        ),
    ],
)
def test_settings_that_pairs_cannot_have_are_refused(settings: dict, words: str) -> None:
    usual = dict(
        sources=(),
        tokenizer="",
        out="",
        capacity=512,
        features_per_tile=0,
        template="clip",
        tiling=Tiling(tile_size=32, mode="crop"),
        pixel_std=(1.0, 1.0, 1.0),
    )
    with pytest.raises(ValueError, match=words):
        Job(**usual | settings).check()
