"""Folders that tokenizers are loaded from."""

from __future__ import annotations

import json
import logging
import shutil
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from megavlm.data.text.tokenizer import fingerprint, load_tokenizer

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"
LOGGER = logging.getLogger("transformers.configuration_utils")


def test_the_model_beside_a_tokenizer_may_be_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers warns that an InternVLChatModel may not fit the model that is made of it."""
    told = BufferingHandler(capacity=100)
    monkeypatch.setattr(LOGGER, "handlers", [told])
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "chat"))
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    assert fingerprint(load_tokenizer(folder)) == fingerprint(load_tokenizer(TOKENIZER))
    assert not told.buffer
    LOGGER.warning("You are using a model of type")  # of what is loaded later
    assert len(told.buffer) == 1
