"""``config.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import InternVLConfig

from megavlm.config.models import MODELS
from megavlm.config.preference import Preference
from megavlm.config.schema import Architecture, Connector
from megavlm.convert.hf import language_config, native_config
from megavlm.convert.hf.hub_formats import dialect_of
from megavlm.convert.hf.json_files import write_json
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.convert.hf.token_ids import TokenIds
from tests.convert.models import KINDS, NATIVE_KINDS, SMALL, as_native, language

INTERNVL = {name: one for name, one in MODELS.items() if one.image_tokens == "internvl"}


def settings_of(architecture: Architecture) -> dict:
    return native_config.write(
        architecture, TokenIds(image=90, begin=0, end=1, pad=2), torch.bfloat16
    )


@pytest.mark.parametrize(
    "architecture",
    [*NATIVE_KINDS.values(), *INTERNVL.values()],
    ids=[*NATIVE_KINDS, *INTERNVL],
)
def test_there_and_back(tmp_path: Path, architecture: Architecture) -> None:
    write_json(tmp_path / "config.json", settings_of(architecture))
    assert (
        architecture_from_hf(tmp_path) == as_native(architecture)
        and dialect_of(tmp_path) == "native"
    )
    # As transformers itself writes it.
    InternVLConfig.from_dict(settings_of(architecture)).save_pretrained(tmp_path)
    assert architecture_from_hf(tmp_path) == as_native(architecture)


def test_what_the_shape_of_weights_does_not_tell_is_kept(tmp_path: Path) -> None:
    shuffled = replace(
        SMALL,
        connector=Connector(pixel_shuffle=4),
        vision=replace(SMALL.vision, layer_scale=0.5, layernorm_epsilon=1e-3),
    )
    write_json(tmp_path / "config.json", settings_of(shuffled))
    write_json(
        tmp_path / "preprocessor_config.json",
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    )
    expected = replace(
        shuffled,
        vision=replace(shuffled.vision, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6)),
    )
    assert architecture_from_hf(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").unlink()
    write_json(
        tmp_path / "processor_config.json",
        {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}},
    )
    assert architecture_from_hf(tmp_path) == expected


def test_the_rotary_base_of_older_files_is_read(tmp_path: Path) -> None:
    settings = settings_of(SMALL)
    del settings["text_config"]["rope_parameters"]
    write_json(tmp_path / "config.json", settings)
    assert architecture_from_hf(tmp_path).language.rotary_base == 12345.0


def test_a_factor_stretches_dynamic_positions_alone(tmp_path: Path) -> None:
    settings = settings_of(SMALL)
    for kind, expected in (("default", 1.0), ("dynamic", 3.0)):
        positions = {"rope_type": kind, "rope_theta": 1e4, "factor": 3.0}
        settings["text_config"]["rope_parameters"] = positions
        write_json(tmp_path / "config.json", settings)
        found = architecture_from_hf(tmp_path)
        assert found.language.rotary_dynamic_factor == expected
    del positions["factor"]
    assert list(language_config.problems(settings["text_config"], "text_config")) == [
        "text_config.rope_scaling.factor is missing"
    ]


def test_models_of_other_kinds_are_refused_with_all_reasons(tmp_path: Path) -> None:
    settings = settings_of(SMALL)
    settings["vision_config"] |= {
        "use_qk_norm": True,
        "layer_norm_eps": 1e-5,
        "image_size": [28, 56],
    }
    settings["text_config"] |= {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    }
    settings["vision_feature_layer"] = -2
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(ValueError, match=r"config.json") as error:
        architecture_from_hf(tmp_path)
    for reason in (
        "vision_config.layer_norm_eps is 1e-05",
        "vision_config.image_size is [28, 56]",
        "'linear'",
        "\n  vision_feature_layer is -2",
    ):
        assert reason in str(error.value)


def test_other_language_models_are_refused(tmp_path: Path) -> None:
    settings = settings_of(SMALL)
    settings["text_config"]["model_type"] = "gemma3_text"
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(
        ValueError,
        match=r"text_config.model_type is 'gemma3_text', must be one of qwen2, qwen3, .*mistral",
    ):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sliding_window": 2047}, "text_config.sliding_window is 2047, must be None"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 256,
                }
            },
            "rotary positions are of type 'longrope', must be 'default' or 'dynamic'",
        ),
    ],
)
def test_what_other_models_of_phi3s_kind_have_is_refused(
    tmp_path: Path, change: dict, told: str
) -> None:
    settings = settings_of(NATIVE_KINDS["phi3"])
    settings["text_config"] |= change
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "internvl_chat"}', r"ps_version is missing(.|\n)*llm_config is missing"),
        ('{"model_type": "qwen2"}', "must be 'internvl' or 'internvl_chat'.*; a language model or"),
        (
            '{"model_type": "mllama", "vision_config": {}}',
            "must be 'internvl' or .*; no other vision-language model can be trained here; one",
        ),
        (
            json.dumps({"model_type": "internvl", "vision_config": {"hidden_size": "wide"}}),
            "transformers cannot read it",
        ),
    ],
)
def test_files_without_sense_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        architecture_from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        architecture_from_hf(tmp_path)


def test_differences_name_flags_with_both_values() -> None:
    other = replace(
        SMALL,
        language=replace(SMALL.language, rotary_base=1e6),
        vision=replace(SMALL.vision, image_size=56),
    )
    assert differences(SMALL, other) == [
        "--architecture.language.rotary_base: 12345.0 there, 1000000.0 asked for"
    ]
    assert differences(SMALL, SMALL) == []


def test_names_of_weights_and_tied_heads_are_no_difference() -> None:
    assert (
        differences(
            language(family="llama", tied_head=True), language(family="internlm2", kv_channels=8)
        )
        == []
    )
    assert differences(SMALL, language(tied_head=True)) == [
        "--architecture.language.tied_head: False there, True asked for"
    ]


def test_a_folder_may_be_trained_on_preferences() -> None:
    asked = replace(SMALL, objective="preference", preference=Preference(beta=0.5))
    assert differences(SMALL, asked) == []
    assert differences(SMALL, replace(SMALL, objective="contrastive"))[0] == (
        "--architecture.objective: next_token there, contrastive asked for"
    )


def test_with_other_differences_family_and_tied_head_are_listed_too() -> None:
    found = language(family="llama", tied_head=True, rotary_base=5e5)
    assert differences(found, SMALL) == [
        "--architecture.language.family: llama there, qwen2 asked for",
        "--architecture.language.rotary_base: 500000.0 there, 12345.0 asked for",
        "--architecture.language.tied_head: True there, False asked for",
    ]


def test_epsilons_are_compared_as_float32() -> None:
    as_float32 = language(layernorm_epsilon=9.999999747378752e-06)
    assert differences(as_float32, language(layernorm_epsilon=1e-5)) == []
    assert differences(as_float32, language(layernorm_epsilon=1.0001e-5)) != []


def test_what_transformers_would_compute_otherwise_is_not_written() -> None:
    other = replace(
        KINDS["InternViT-6B"], vision=replace(KINDS["InternViT-6B"].vision, layernorm_epsilon=1e-5)
    )
    with pytest.raises(ValueError, match="layernorm_epsilon 1e-05.*chat dialect"):
        settings_of(other)
