"""config.json with values of another kind than it should have: the file and the setting are named,
or the value is one that no field is read from.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import (
    blip2_config,
    fuyu_config,
    idefics_config,
    language_config,
    native_config,
    preprocessing,
)
from megavlm.convert.hf.json_files import read_config, refuse, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.vision_part import vision_from_hf
from megavlm.convert.weights.families import FAMILIES
from megavlm.data.text.templates import FORMATS
from tests.convert.blip2_models import OPT
from tests.convert.idefics_models import FLAMINGO
from tests.convert.models import KINDS, SMALL, ids_with

STRANGE = ([1, 2], "x", None, -1, 1.5)
INTERNVIT = {
    "model_type": "intern_vit_6b",
    "image_size": 448,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 0.1,
}


INTERNVL_CHAT = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "force_image_size": 448,
    "vision_config": INTERNVIT,
    "llm_config": transformers.Qwen2Config().to_dict(),
}
LANGUAGE_MODELS = [
    transformers.Qwen2Config(),
    transformers.Qwen3MoeConfig(),
    transformers.Dots1Config(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    transformers.GptOssConfig(),
    transformers.OPTConfig(),
    transformers.PersimmonConfig(),
    transformers.Phi3Config(),
    transformers.GemmaConfig(),
]


def spoilt(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield settings with one strange value each, at every place."""
    for path in places(settings):
        for value in STRANGE:
            changed = copy.deepcopy(settings)
            section = changed
            for name in path[:-1]:
                section = section[name]
            section[path[-1]] = value
            yield changed


def places(settings: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield where the settings are, such as ``("text_config", "hidden_size")``."""
    for name, value in settings.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *inner) for inner in places(value))


def ill_typed(found: Any, usual: Any) -> list[str]:
    """Return the fields whose values have not the type of those of ``usual``."""
    wrong = []
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        other = getattr(usual, field.name)
        if dataclasses.is_dataclass(value):
            wrong += ill_typed(value, other)
        elif type(value) is not type(other) and (type(value), type(other)) != (int, float):
            wrong.append(field.name)
    return wrong


def check(folder: Path, settings: dict[str, Any], read: Callable[[Path], Any], usual: Any) -> None:
    """Read a file and every spoilt one: it is refused by name, or no field is of another type."""
    write_json(folder / "config.json", settings)
    assert not ill_typed(read(folder), usual)
    refused = 0
    for changed in spoilt(settings):
        write_json(folder / "config.json", changed)
        try:
            assert not ill_typed(read(folder), usual), changed
        except ValueError as error:
            assert str(folder / "config.json") in str(error)
            refused += 1
    assert refused > 50


def test_strange_values_of_a_model_are_named(tmp_path: Path) -> None:
    check(tmp_path, INTERNVL_CHAT, architecture_from_hf, Architecture())


@pytest.mark.parametrize(
    "settings",
    [
        INTERNVIT,
        transformers.CLIPVisionConfig().to_dict(),
        transformers.SiglipVisionConfig().to_dict(),
    ],
    ids=lambda settings: settings["model_type"],
)
def test_strange_values_of_a_vision_encoder_are_named(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    check(tmp_path, settings, vision_from_hf, Vision())


@pytest.mark.parametrize("config", LANGUAGE_MODELS, ids=lambda config: config.model_type)
def test_strange_values_of_a_language_model_are_named(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    settings = config.to_dict() | FAMILIES[config.model_type].settings

    def read(folder: Path) -> Language:
        path = folder / "config.json"
        raw = read_config(path)
        refuse(path, list(language_config.problems(raw, "")))
        return language_config.read(raw, tied_head=False)

    check(tmp_path, settings, read, Language())


def test_the_sentence_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(
        path, transformers.Qwen2Config().to_dict() | {"rope_parameters": [1], "hidden_size": 0}
    )
    found = list(language_config.problems(read_config(path), "text_config"))
    assert found == [
        "text_config.hidden_size is 0, must be a whole number of at least 1",
        "text_config.rope_parameters is [1], must be an object",
    ]


@pytest.mark.parametrize("config", LANGUAGE_MODELS, ids=lambda config: config.model_type)
def test_tokens_that_see_later_ones_are_refused(config: PreTrainedConfig) -> None:
    settings = config.to_dict() | FAMILIES[config.model_type].settings
    for value in (False, None):  # to transformers, null is no truth either
        found = list(language_config.problems(settings | {"is_causal": value}, "text_config"))
        assert f"text_config.is_causal is {value}, must be True" in found
    assert list(language_config.problems(settings | {"is_causal": True}, "text_config")) == list(
        language_config.problems(settings, "text_config")
    )


NATIVE = native_config.write(SMALL, ids_with(5), torch.float32)
BLIP2 = blip2_config.write(OPT, ids_with(5), torch.float32)
IDEFICS = idefics_config.write(FLAMINGO, ids_with(0), torch.float32)
EXPERTS = native_config.write(KINDS["qwen3_moe"], ids_with(5), torch.float32)


@pytest.mark.parametrize(
    ("settings", "path", "value", "told"),
    [
        (NATIVE, "downsample_ratio", 0.0, "is 0.0, must be 1 / a whole number"),
        (NATIVE, "downsample_ratio", -0.5, "is -0.5, must be 1 / a whole number"),
        (NATIVE, "vision_config.num_hidden_layers", 0, "is 0, must"),
        (NATIVE, "vision_config.intermediate_size", 0, "is 0, must"),
        (NATIVE, "text_config.hidden_size", 49, "is 49, must be a multiple of num_attention_head"),
        (NATIVE, "text_config.num_attention_heads", 3, "is 3, must be a multiple of num_key_value"),
        (EXPERTS, "text_config.num_experts", 0, "is 0, must"),
        (EXPERTS, "text_config.moe_intermediate_size", 0, "is 0, must"),
        (BLIP2, "vision_config.num_hidden_layers", 0, "is 0, must"),
        (BLIP2, "qformer_config.intermediate_size", 0, "is 0, must"),
        (BLIP2, "qformer_config.cross_attention_frequency", 0, "is 0, must"),
        (BLIP2, "num_query_tokens", 0, "is 0, must"),
        (IDEFICS, "perceiver_config.resampler_n_latents", 0, "is 0, must"),
        (IDEFICS, "perceiver_config.resampler_n_heads", 0, "is 0, must"),
    ],
)
def test_sizes_that_cannot_be_are_named(
    tmp_path: Path, settings: dict[str, Any], path: str, value: Any, told: str
) -> None:
    changed = copy.deepcopy(settings)
    section = changed
    *outer, name = path.split(".")
    for part in outer:
        section = section[part]
    section[name] = value
    write_json(tmp_path / "config.json", changed)
    with pytest.raises(ValueError, match=f"/config.json: [^/]*{re.escape(path)} {told}"):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_strange_colours_of_an_image_processor_are_named(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", INTERNVIT)
    for strange in ({}, [], [1, 2], "abc", None, [0.5, 0.5, "x"]):
        write_json(tmp_path / "preprocessor_config.json", {name: strange})
        with pytest.raises(
            ValueError, match=rf"preprocessor_config.json: {name} is .*a number or thr"
        ):
            vision_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_normalize": False}, "do_normalize is False, must be True"),
        ({"do_rescale": False}, "do_rescale is False, must be True"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, must be 1 / 255"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x', must be 1 / 255"),
    ],
)
def test_pixels_that_are_scaled_otherwise_are_refused(
    tmp_path: Path, settings: dict, told: str
) -> None:
    write_json(tmp_path / "config.json", INTERNVIT)
    for name, content in (
        ("processor_config.json", {"image_processor": settings}),
        ("preprocessor_config.json", settings),
    ):
        write_json(tmp_path / name, content)
        with pytest.raises(ValueError, match=f"/{name}: [^/]*{told}"):
            vision_from_hf(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"rescale_factor": 0.00392156862745098})
    vision_from_hf(tmp_path)
    write_json(tmp_path / "processor_config.json", {"image_processor": [1]})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"image_processor is \[1\], must be an object"):
        vision_from_hf(tmp_path)


def test_images_that_are_resized_otherwise_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", INTERNVL_CHAT)
    write_json(tmp_path / "preprocessor_config.json", {"resample": 3})
    preprocessing.of_chat(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"resample": 2})
    with pytest.raises(ValueError, match=r"/preprocessor_config.json: [^/]*resample is 2, must be"):
        preprocessing.of_chat(tmp_path)


def test_no_system_message_is_that_of_the_template(tmp_path: Path) -> None:
    own = FORMATS["Hermes-2"].system_message
    for stated, found in (({}, own), ({"system_message": None}, own), ({"system_message": ""}, "")):
        write_json(tmp_path / "config.json", {"template": "Hermes-2", **stated})
        assert preprocessing.of_chat(tmp_path).system_message == found


def test_thumbnails_that_transformers_makes_all_the_same_are_not_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", {"use_thumbnail": False})
    with pytest.raises(ValueError, match="/preprocessor_config.json: [^/]*use_thumbnail is False"):
        preprocessing.of_native(tmp_path)


@pytest.mark.parametrize(
    ("read", "file", "strange"),
    [
        (preprocessing.of_native, "preprocessor_config.json", {"max_patches": "x"}),
        (preprocessing.of_native, "preprocessor_config.json", {"min_patches": 0}),
        (preprocessing.of_native, "preprocessor_config.json", {"use_thumbnail": "no"}),
        (preprocessing.of_chat, "config.json", {"max_dynamic_patch": [6]}),
        (preprocessing.of_chat, "config.json", {"template": ["a"]}),
        (preprocessing.of_chat, "config.json", {"system_message": 5}),
        (preprocessing.of_chat, "config.json", {"pad2square": 1}),
        (fuyu_config.read_usage, "preprocessor_config.json", {"size": 384}),
        (fuyu_config.read_usage, "preprocessor_config.json", {"size": {"width": "a"}}),
    ],
)
def test_strange_limits_of_images_are_named(
    tmp_path: Path, read: Callable[[Path], Usage], file: str, strange: dict
) -> None:
    write_json(tmp_path / file, strange)
    with pytest.raises(ValueError, match=rf"/{file}: [^/]*{next(iter(strange))}.* is .*, must be"):
        read(tmp_path)
    write_json(tmp_path / file, dict.fromkeys(strange))
    assert read(tmp_path).max_tiles in (1, 12)
