"""Folders of tokenizers of each kind, with the special tokens of InternVL."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from megavlm.data.text.tokenizer import extend
from tests.convert.models import TOKENIZER
from tests.data.text.test_templates import sentences


def published_internlm2(folder: Path) -> PreTrainedTokenizerBase:
    """Write a tokenizer as InternLM2 folders have it: a sentencepiece model, added tokens in the
    settings, and Python code, which ends the process if it is run.
    """
    tokenizer = sentences(folder, "InternLM2Tokenizer", starts_with_space=False)
    path = folder / "tokenizer_config.json"
    added = {
        str(number): {"content": token.content, "special": True, "normalized": False}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": added}
    path.write_text(json.dumps(settings))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('run')\n")
    return tokenizer


def make_tokenizers(root: Path) -> dict[str, Path]:
    """Write one folder for each kind: byte-level BPE cut as Qwen2 cuts texts, and sentencepiece
    that puts a space before a text or does not.
    """
    names = ("qwen2 bytes", "sentencepiece", "sentencepiece with a space")
    folders = {name: root / name for name in names}
    golden = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in golden["merges"]]
    qwen2 = Qwen2Tokenizer(vocab=golden["vocab"], merges=merges)
    qwen2.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    extend(qwen2)
    qwen2.save_pretrained(folders["qwen2 bytes"])
    for name in names[1:]:
        folders[name].mkdir(parents=True)
    published_internlm2(folders["sentencepiece"])
    (root / "llama").mkdir()
    llama = sentences(root / "llama", "LlamaTokenizer", starts_with_space=True)
    llama.save_pretrained(folders["sentencepiece with a space"])
    return folders
