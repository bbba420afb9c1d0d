"""Folders that tokenizers are loaded from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from megavlm.data.text.tokenizer import fingerprint, load_tokenizer

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"


def test_the_model_beside_a_tokenizer_may_be_of_any_kind(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """transformers warns that an InternVLChatModel may not fit the model that is made of it."""
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "chat"))
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    assert fingerprint(load_tokenizer(folder)) == fingerprint(load_tokenizer(TOKENIZER))
    told = "You are using a model of type"
    assert told not in capfd.readouterr().err
    logging.getLogger("transformers.configuration_utils").warning(told)  # of what comes later
    assert told in capfd.readouterr().err
