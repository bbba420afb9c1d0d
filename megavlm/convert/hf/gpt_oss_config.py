"""The settings of a GPT-OSS, from and to its part of config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megavlm.config.schema import Language
from megavlm.convert.hf.json_files import (
    SIZES,
    compressed_rotary_problems,
    contradictions,
    group_problems,
    layer_type_problems,
    layer_types,
    missing,
    no_positive_numbers,
    no_sizes,
    rotary_problems,
    rotary_settings,
)
from megavlm.convert.weights.families import gpt_oss

_EPSILON = "rms_norm_eps"
_NEEDED = (
    *SIZES,
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    _EPSILON,
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
)
# What YaRN is here beside its factor, its first length and whether its ramp is rounded.
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "partial_rotary_factor": 1.0,
}


def problems(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield why a GPT-OSS cannot be trained here; arguments as of ``language_config.problems``."""
    yield from missing(section, settings, *_NEEDED)
    unreadable = list(_unreadable(settings, section))
    if unreadable:
        yield from unreadable
        return
    yield from contradictions(section, settings, gpt_oss.FAMILY.settings)
    if settings.get("num_attention_heads"):
        yield from group_problems(section, settings)
    yield from layer_type_problems(section, settings)
    scaling = _scaling(settings)
    name = f"{section}.rope_scaling".lstrip(".")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        yield f"{name}: rotary positions of each kind of layer, must be the same in all"
        return
    kind = _rope_type(scaling)
    if kind not in ("yarn", "default"):
        yield f"{name}: rotary positions are of type {kind!r}, must be 'yarn' or 'default'"
        return
    if scaling.get("rope_theta", settings.get("rope_theta")) is None:
        yield f"{section}.rope_theta is missing".lstrip(".")
    if kind == "yarn":
        yield from compressed_rotary_problems(section, scaling)
        length = "original_max_position_embeddings"
        yield from missing(name, scaling, length)
        # transformers takes the one beside rope_scaling, if there are two.
        yield from contradictions(section, settings, {length: scaling.get(length)})
        yield from contradictions(name, scaling, _YARN)


def _unreadable(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield settings whose values are of another kind than ``read`` takes."""
    yield from no_sizes(section, settings, *(name for name in _NEEDED if name != _EPSILON))
    yield from no_positive_numbers(section, settings, _EPSILON)
    scaling = rotary_settings(settings)
    if isinstance(scaling, Mapping):
        name = f"{section}.rope_scaling".lstrip(".")
        yield from no_sizes(name, scaling, "original_max_position_embeddings")
    yield from rotary_problems(section, settings)


def read(settings: Mapping[str, Any], *, tied_head: bool) -> Language:
    """Read a GPT-OSS; arguments as of ``language_config.read``."""
    scaling = _scaling(settings)
    heads = settings["num_attention_heads"]
    width = settings["hidden_size"]
    size = settings["head_dim"]
    yarn = {}
    if _rope_type(scaling) == "yarn" and scaling["factor"] != 1:
        yarn = dict(
            rotary_yarn_factor=float(scaling["factor"]),
            rotary_yarn_positions=scaling["original_max_position_embeddings"],
            rotary_yarn_truncate=bool(scaling.get("truncate", True)),
        )
    return Language(
        family="gpt_oss",
        num_layers=settings["num_hidden_layers"],
        hidden_size=width,
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=settings["num_key_value_heads"],
        kv_channels=0 if size * heads == width else size,
        vocab_size=settings["vocab_size"],
        rotary_base=float(scaling.get("rope_theta", settings.get("rope_theta"))),
        layernorm_epsilon=settings[_EPSILON],
        max_position_embeddings=settings["max_position_embeddings"],
        tied_head=tied_head,
        num_experts=settings["num_local_experts"],
        experts_per_token=settings["num_experts_per_tok"],
        expert_ffn_hidden_size=settings["intermediate_size"],
        window_size=settings["sliding_window"],
        **yarn,
        **gpt_oss.FAMILY.facts,
    )


def write(language: Language) -> dict[str, Any]:
    """Return the sizes in a GPT-OSS's part of config.json."""
    base = language.rotary_base
    scaling: dict[str, Any] = {"rope_type": "default"}
    if language.rotary_yarn_factor != 1:
        scaling = {
            "rope_type": "yarn",
            "factor": language.rotary_yarn_factor,
            "original_max_position_embeddings": language.rotary_yarn_positions,
            "truncate": language.rotary_yarn_truncate,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
    return {
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.expert_ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_size,
        "vocab_size": language.vocab_size,
        _EPSILON: language.layernorm_epsilon,
        "max_position_embeddings": language.max_position_embeddings,
        "num_local_experts": language.num_experts,
        "num_experts_per_tok": language.experts_per_token,
        "sliding_window": language.window_size,
        "layer_types": layer_types(language.num_layers),
        "rope_theta": base,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": base},
    }


def _scaling(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of rotary positions, as transformers 5 or 4 calls them. The class of
    GPT-OSS takes YaRN if there are none.
    """
    return rotary_settings(settings) or {"rope_type": "yarn"}


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))
