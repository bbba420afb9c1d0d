"""The tokenizer of a Hugging Face folder, copied to where a checkpoint keeps it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from megavlm.convert.hf.json_files import read_json
from megavlm.convert.hf.tokenizer_files import FILES, SETTINGS_NAME
from megavlm.data.text.tokenizer import (
    LIKE_LLAMA,
    QFORMER_TOKENIZER,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
)


def copy_tokenizer(folder: Path, target: Path) -> str | None:
    """Copy the tokenizer, where there is one, and return its fingerprint.

    Raises:
        ValueError: it needs Python code of its own.
    """
    present = [name for name in FILES if (folder / name).is_file()]
    if SETTINGS_NAME not in present:
        return None
    settings = read_json(folder / SETTINGS_NAME)
    if "auto_map" in settings and "tokenizer.json" not in present:
        if settings.get("tokenizer_class") in LIKE_LLAMA and "tokenizer.model" in present:
            return _read_without_code(folder, target)
        raise ValueError(
            f"{folder}: the tokenizer is Python code of the model's own (auto_map in"
            " tokenizer_config.json), which is never run; name a folder with the same tokenizer as"
            " tokenizer.json with --tokenizer"
        )
    target.mkdir()
    for name in present:
        shutil.copyfile(folder / name, target / name)
    return fingerprint(load_tokenizer(target))


def copy_qformer_tokenizer(folders: Iterable[str | Path], target: Path) -> None:
    """Copy the tokenizer of a Q-Former out of the first folder that has one beside its own."""
    inside = (Path(folder) / QFORMER_TOKENIZER for folder in folders if folder)
    found = next((folder for folder in inside if folder.is_dir()), None)
    if found and target.is_dir():
        copy_tokenizer(found, target / QFORMER_TOKENIZER)


def _read_without_code(folder: Path, target: Path) -> str:
    """Write the tokenizer of an InternLM, whose sentencepiece model is read without the code beside
    it, as ``tokenizer.json``, and return its fingerprint.
    """
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, target)
    written = fingerprint(load_tokenizer(target))
    if written != fingerprint(tokenizer):
        raise ValueError(f"{folder}: its tokenizer is another one once it is saved")
    return written
