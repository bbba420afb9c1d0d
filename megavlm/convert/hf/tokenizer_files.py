"""The tokenizer of an exported model, in files that every loader reads.

A tokenizer comes out of training as transformers 5 saves it: one ``tokenizer.json``, in a form that
older releases of ``tokenizers`` refuse, and settings that name classes which transformers 4 does
not have. Exports therefore hold a ``tokenizer.json`` in the older form, the files of the slow
classes (``vocab.json`` and ``merges.txt`` of byte-level BPE, ``tokenizer.model`` of sentencepiece),
and settings in which each entry is one that transformers 4.37 to 5 read alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.convert.hf import sentencepiece_file
from megavlm.convert.hf.json_files import write_json
from megavlm.data.text.tokenizer import fingerprint, first_tokens, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_NAME = "chat_template.jinja"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    TEMPLATE_NAME,
)
SETTINGS_NAME = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# How Qwen2Tokenizer of transformers 4 cuts a text; only tokenizers that cut it so may name it.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def copy(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer as they are from one folder into another."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write(source: Path, target: Path, entries: dict[str, Any]) -> None:
    """Write the tokenizer of one folder into another, for transformers 4.37 to 5.

    Args:
        source: folder of the tokenizer.
        target: folder of the model.
        entries: of ``tokenizer_config.json`` that are the dialect's own.

    Raises:
        ValueError: the files would be read as another tokenizer.
    """
    tokenizer = load_tokenizer(source)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _write_backend(content, target)
    kind = _write_slow(content, target)
    write_json(target / SETTINGS_NAME, _settings(tokenizer, kind) | entries)
    write_json(target / "special_tokens_map.json", _special_tokens(tokenizer))
    written = load_tokenizer(target)
    same_start = first_tokens(written) == first_tokens(tokenizer)
    if fingerprint(written) != fingerprint(tokenizer) or not same_start:
        raise ValueError(
            f"--tokenizer {source}: would be another tokenizer once it is written"
            f" ({type(written).__name__} in place of {type(tokenizer).__name__})"
        )


def _write_backend(content: dict[str, Any], target: Path) -> None:
    """Write ``tokenizer.json`` in the form that tokenizers 0.15 (transformers 4.37) reads too.

    It knows merges as text, and Metaspace only with a cut at every space. Replacing spaces says the
    same without a cut, if no space is put in front of a text; else 0.15 cuts, and newer do not.
    """
    model = content["model"]
    if model.get("merges") and not any(" " in token for pair in model["merges"] for token in pair):
        model = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    changes: dict[str, Any] = {"model": model}
    cut = content.get("pre_tokenizer") or {}
    if cut.get("type") == "Metaspace":
        changes["pre_tokenizer"] = cut | {"add_prefix_space": cut["prepend_scheme"] != "never"}
    is_plain = cut.get("type") == "Metaspace" and cut.get("prepend_scheme") == "never"
    if is_plain and not cut.get("split", True) and content.get("normalizer") is None:
        space = {"type": "Replace", "pattern": {"String": " "}, "content": cut["replacement"]}
        changes |= {"normalizer": space, "pre_tokenizer": None}
    write_json(target / "tokenizer.json", content | changes)


def _write_slow(content: dict[str, Any], target: Path) -> dict[str, Any]:
    """Write the files of the slow class, and return the settings that name it."""
    model = content["model"]
    if model["type"] != "BPE":
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    if model.get("byte_fallback"):
        proto = sentencepiece_file.build(content)
        if proto is None:
            return {"tokenizer_class": "PreTrainedTokenizerFast"}
        (target / "tokenizer.model").write_bytes(proto)
        scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
        return {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": scheme != "first",
            "add_prefix_space": scheme != "never",
            "sp_model_kwargs": {},
        }
    write_json(target / "vocab.json", model["vocab"])
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (target / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    is_qwen2 = {"Regex": _QWEN2} in [
        part.get("pattern") for part in (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    ]
    return {"tokenizer_class": "Qwen2Tokenizer" if is_qwen2 else "PreTrainedTokenizerFast"}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the named special tokens, and the others as a list."""
    named = {name: getattr(tokenizer, name) for name in _NAMED}
    found = {name: str(token) for name, token in named.items() if token is not None}
    others = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and str(token) not in found.values()
    ]
    return found | {"additional_special_tokens": others}


def _settings(tokenizer: PreTrainedTokenizerBase, kind: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``.

    The slow classes take added tokens from ``added_tokens_decoder``. Named tokens that are absent
    are null, or a class would fill in its own and add it to the vocabulary.
    """
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    special = _special_tokens(tokenizer)
    return {
        "added_tokens_decoder": added,
        "add_bos_token": bool(first_tokens(tokenizer)),
        "add_eos_token": False,
        **dict.fromkeys(_NAMED),
        **special,
        "clean_up_tokenization_spaces": False,
        # PreTrainedTokenizerFast of transformers 4 would add token_type_ids; generate refuses them.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        **kind,
    }
