"""The table of formats of Hugging Face folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import transformers

from megavlm.config.exports import HOLDS
from megavlm.config.recipes import RECIPES, blip2
from megavlm.convert.hf import convert
from megavlm.convert.hf.card_examples import EXAMPLES
from megavlm.convert.hf.hub_formats import HUB_FORMATS, dialect_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.families import family_of
from megavlm.convert.weights.tables import Dialect
from tests.config.test_cli import with_value
from tests.convert.models import SMALL, make_hf

DIALECTS = get_args(Dialect)


def test_every_dialect_of_the_weights_has_a_row() -> None:
    assert tuple(HUB_FORMATS) == DIALECTS == tuple(HOLDS)
    assert tuple(EXAMPLES) == DIALECTS
    for row in RECIPES.values():
        assert {row.hub_format, *row.other_formats.values()} <= set(HUB_FORMATS)
    for row in HUB_FORMATS.values():
        assert hasattr(transformers, row.class_name) == row.is_in_transformers, row.class_name


@pytest.mark.parametrize(
    ("recipe", "field", "value"),
    [
        ("internvl_c", "vision.activation", "quick_gelu"),
        ("llava", "vision.normalization", "RMSNorm"),
        ("llava_next", "vision.qk_norm", True),
        ("paligemma", "vision.qkv_bias", False),
        ("flamingo", "vision.qkv_bias", False),
        ("clip", "vision.normalization", "RMSNorm"),
        ("clip", "language.scaled_embedding", True),
        ("siglip", "language.qk_norm", True),
        ("fuyu", "language.rotary_sections", (16, 24, 24)),
        ("qwen2_vl", "vision.window_size", 112),
        ("qwen2_vl", "vision.tokens_per_second", 2),
        ("qwen3_vl", "vision.tokens_per_second", 2),
        ("qwen2_vl", "vision.layernorm_epsilon", 1e-5),
        ("qwen2_5_vl", "language.rotary_dynamic_factor", 2.0),
        ("qwen2_5_vl", "vision.activation", "gelu"),
        ("qwen3_vl", "vision.activation", "swiglu"),
        ("qwen3_vl", "language.rotary_interleaved", False),
        ("qwen3_vl", "language.family", "qwen2"),
    ],
)
def test_what_config_json_cannot_say_is_refused(recipe: str, field: str, value: object) -> None:
    holds = HOLDS[RECIPES[recipe].hub_format]
    model = RECIPES[recipe].architecture
    assert not list(holds(model))
    [reason] = holds(with_value(model, field, value))
    assert f" has --architecture.{field} " in reason


def test_an_internvit_has_the_exact_gelu() -> None:
    fast = with_value(SMALL, "vision.activation", "gelu_tanh")
    for dialect in ("native", "chat"):
        [reason] = HOLDS[dialect](fast)
        assert "vision.activation gelu; this model has gelu_tanh" in reason


def test_config_json_states_yarn_of_gpt_oss_alone() -> None:
    with pytest.raises(ValueError, match="rotary_yarn_factor is 4.0, must be 1.0"):
        family_of(dataclasses.replace(SMALL.language, rotary_yarn_factor=4.0))
    with pytest.raises(ValueError, match="num_query_groups is 8, must be 32"):
        family_of(dataclasses.replace(blip2.ARCHITECTURE.language, num_query_groups=8))


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
