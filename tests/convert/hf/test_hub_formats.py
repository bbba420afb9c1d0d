"""The table of formats of Hugging Face folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import transformers

from megavlm.config.exports import HOLDS
from megavlm.config.recipes import RECIPES
from megavlm.convert.hf import convert
from megavlm.convert.hf.card_examples import EXAMPLES
from megavlm.convert.hf.hub_formats import HUB_FORMATS, dialect_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.tables import Dialect
from tests.convert.models import SMALL, make_hf

DIALECTS = get_args(Dialect)


def test_every_dialect_of_the_weights_has_a_row() -> None:
    assert tuple(HUB_FORMATS) == DIALECTS == tuple(HOLDS)
    assert tuple(EXAMPLES) == DIALECTS
    for row in RECIPES.values():
        assert {row.hub_format, *row.other_formats.values()} <= set(HUB_FORMATS)
    for row in HUB_FORMATS.values():
        assert hasattr(transformers, row.class_name) == row.is_in_transformers, row.class_name


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if not list(HOLDS[name](SMALL))])
def test_an_export_names_the_class_of_its_row(tmp_path: Path, dialect: str) -> None:
    start = convert.import_(make_hf(tmp_path / "hf"), tmp_path / "start")
    settings = read_json(convert.export(start, tmp_path / "out", dialect=dialect) / "config.json")
    row = HUB_FORMATS[dialect]
    assert settings["architectures"] == [row.class_name]
    assert settings["model_type"] == row.model_type
    assert dialect_of(tmp_path / "out") == dialect


def test_a_new_row_is_found_by_its_model_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mine"})
    with pytest.raises(
        ValueError, match="model_type is 'mine', must be 'internvl' or .*; a language model"
    ):
        architecture_from_hf(tmp_path)
    row = dataclasses.replace(
        HUB_FORMATS["native"],
        model_type="mine",
        read_architecture=lambda raw, folder, *, has_head: SMALL,
    )
    monkeypatch.setitem(HUB_FORMATS, "mine", row)
    assert dialect_of(tmp_path) == "mine" and architecture_from_hf(tmp_path) == SMALL
