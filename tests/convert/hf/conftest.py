"""What tests of several formats share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.round_trip import golden_words


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer with the tokens of LLaVA's images."""
    folder = tmp_path_factory.mktemp("words")
    golden_words(folder, "llava")
    return folder
