"""What a config.json of a GPT-OSS cannot say is named, and nothing else is taken for what it is."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.convert.hf import gpt_oss_config
from tests.convert.models import KINDS

SETTINGS = gpt_oss_config.write(KINDS["gpt_oss"].language)
ROTARY = SETTINGS["rope_parameters"]
KINDS_OF_LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_types": KINDS_OF_LAYERS[::-1] * 9}, "one for each of num_hidden_layers"),
        ({"layer_types": KINDS_OF_LAYERS}, "by turns"),
        ({"layer_types": []}, "by turns"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"rope_parameters": dict.fromkeys(KINDS_OF_LAYERS, ROTARY)}, "the same in all"),
        ({"rope_parameters": ROTARY | {"rope_theta": None}}, "rope_theta is missing"),
        ({"rope_parameters": ROTARY | {"beta_fast": 16}}, "beta_fast is 16"),
        ({"rope_parameters": ROTARY | {"factor": 0.5}}, "factor is 0.5, must be at least 1"),
        ({"rope_parameters": ROTARY | {"factor": None}}, "rope_scaling.factor is missing"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, must be a multiple of num_key"),
        ({"original_max_position_embeddings": 8}, "original_max_position_embeddings is 8, must be"),
    ],
)
def test_what_is_not_computed_here_is_named(changes: dict[str, Any], told: str) -> None:
    assert not list(gpt_oss_config.problems(SETTINGS, "llm_config"))
    [problem] = gpt_oss_config.problems(SETTINGS | changes, "llm_config")
    assert told in problem


@pytest.mark.parametrize(("truncate", "expected"), [({}, True), ({"truncate": None}, False)])
def test_yarn_is_rounded_where_transformers_rounds_it(truncate: dict, expected: bool) -> None:
    scaling = {name: value for name, value in ROTARY.items() if name != "truncate"} | truncate
    found = gpt_oss_config.read(SETTINGS | {"rope_parameters": scaling}, tied_head=False)
    assert found.rotary_yarn_truncate is expected
