"""Ids of tokens in a config.json that its tokenizer gives to other tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.convert.hf import convert, named_tokens
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.pairs_config import end_problems
from tests.convert.models import CONTEXT, make_hf
from tests.convert.round_trip import golden_words
from tests.convert.tool import run_tool

IMAGE = 631  # of the golden tokenizer, once it is added


def test_an_import_names_both_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_hf(tmp_path / "hf")
    path = folder / "config.json"
    write_json(path, read_json(path) | {"image_token_id": CONTEXT + 1})
    told = (
        f"{path} and {folder / 'tokenizer.json'} disagree: image_token_id is {CONTEXT + 1}, and the"
        f" tokenizer's <IMG_CONTEXT> is {CONTEXT}"
    )
    with pytest.raises(ValueError) as caught:
        convert.import_(folder, tmp_path / "start")
    assert told in str(caught.value) and not (tmp_path / "start").exists()
    assert run_tool("check", "--hf", str(folder)) == 2
    assert told in capsys.readouterr().err


def test_every_class_that_names_a_token_of_images_is_compared(tmp_path: Path) -> None:
    golden_words(tmp_path, "llava")
    for dialect, name in (
        ("llava", "image_token_index"),
        ("llava_next", "image_token_index"),
        ("llava_onevision", "image_token_index"),
        ("paligemma", "image_token_index"),
        ("blip2", "image_token_index"),
        ("instructblip", "image_token_index"),
    ):
        kind = HUB_FORMATS[dialect].model_type
        write_json(tmp_path / "config.json", {"model_type": kind, name: IMAGE})
        named_tokens.check(tmp_path, tmp_path, "llava")
        write_json(tmp_path / "config.json", {"model_type": kind, name: IMAGE - 1})
        with pytest.raises(ValueError, match=f"{name} is 630, and the tokenizer's <image> is 631"):
            named_tokens.check(tmp_path, tmp_path, "llava")
    # Older folders of BLIP-2 name none, and their tokenizers have none.
    write_json(tmp_path / "config.json", {"model_type": "blip-2"})
    named_tokens.check(tmp_path, tmp_path, "llava")
    write_json(tmp_path / "config.json", {"model_type": "fuyu", "image_token_id": 7})
    named_tokens.check(tmp_path, tmp_path, "fuyu")
    golden_words(tmp_path, "fuyu")
    with pytest.raises(ValueError, match=r"image_token_id is 7, and the tokenizer's \|SPEAKER\|"):
        named_tokens.check(tmp_path, tmp_path, "fuyu")
    write_json(tmp_path / "config.json", {"model_type": "qwen2_5_vl", "image_token_id": 7})
    golden_words(tmp_path, "qwen2_vl")
    with pytest.raises(ValueError, match=r"image_token_id is 7, and the tokenizer's <\|image_pad"):
        named_tokens.check(tmp_path, tmp_path, "qwen2_vl")
    write_json(tmp_path / "config.json", {"model_type": "qwen3_vl_moe", "image_token_id": 7})
    with pytest.raises(ValueError, match=r"image_token_id is 7, and the tokenizer's <\|image_pad"):
        named_tokens.check(tmp_path, tmp_path, "qwen2_vl")


@pytest.mark.parametrize(
    ("stated", "end", "told"),
    [
        (9, 9, ""),
        (9, None, ""),
        (8, 9, "text_config.eos_token_id is 8, and the tokenizer's </s> is 9"),
        # transformers takes the highest id of a text for the end, if an old folder says 2.
        (2, 9, ""),
        (2, 4, "is 2, which means the highest id, 9, and the tokenizer's </s> is 4"),
    ],
)
def test_the_end_of_a_clips_texts_is_compared(stated: int, end: int | None, told: str) -> None:
    words = SimpleNamespace(get_vocab=lambda: {"a": 9}, eos_token_id=end, eos_token="</s>")
    found = list(end_problems({"text_config": {"eos_token_id": stated}}, words))
    assert len(found) == bool(told) and told in "".join(found)
    assert HUB_FORMATS["clip"].end_problems is end_problems
