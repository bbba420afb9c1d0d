"""The files of an exported tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentencepiece

from megavlm.convert.hf import sentencepiece_file, tokenizer_files
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from tests.convert.models import TOKENIZER
from tests.convert.tokenizer_kinds import make_tokenizers


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bytes": TOKENIZER} | make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize(
    ("kind", "class_name", "slow"),
    [
        ("bytes", "PreTrainedTokenizerFast", {"vocab.json", "merges.txt"}),
        ("qwen2 bytes", "Qwen2Tokenizer", {"vocab.json", "merges.txt"}),
        ("sentencepiece", "LlamaTokenizer", {"tokenizer.model"}),
        ("sentencepiece with a space", "LlamaTokenizer", {"tokenizer.model"}),
    ],
)
def test_older_loaders_find_what_they_read(
    tmp_path: Path, kinds: dict[str, Path], kind: str, class_name: str, slow: set[str]
) -> None:
    tokenizer_files.write(kinds[kind], tmp_path, {"chat_template": "?"})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == class_name and settings["chat_template"] == "?"
    # transformers 4 wants names here, and finds plain special tokens in the other entry.
    assert "extra_special_tokens" not in settings
    assert "<IMG_CONTEXT>" in settings["additional_special_tokens"]
    assert slow <= {path.name for path in tmp_path.iterdir()}
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(pair, str) for pair in merges)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(load_tokenizer(kinds[kind]))


def test_a_sentencepiece_model_encodes_as_the_one_it_came_from(
    kinds: dict[str, Path], tmp_path: Path
) -> None:
    folder = kinds["sentencepiece"]
    tokenizer_files.write(folder, tmp_path, {})
    before = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    after = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("the quick  fox", "jumps\n\nover", "你好 🙂 naïve"):
        assert after.encode(text) == before.encode(text)


def test_no_sentencepiece_model_is_made_that_encodes_otherwise(kinds: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(kinds["sentencepiece"])
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert sentencepiece_file.build(content) is not None
    content["normalizer"] = {"type": "Lowercase"}  # sentencepiece_file knows none
    assert sentencepiece_file.build(content) is None
    content["normalizer"] = None
    content["model"]["vocab"] = {
        token: number + (number > 10) for token, number in content["model"]["vocab"].items()
    }
    content["added_tokens"] = []
    assert sentencepiece_file.build(content) is None


def test_a_plain_install_reads_sentencepiece_models() -> None:
    text = (Path(__file__).parents[3] / "setup.py").read_text()
    needed = text[text.index("install_requires") : text.index("extras_require")]
    assert re.search('"protobuf>=', needed) and re.search('"sentencepiece>=', needed)
