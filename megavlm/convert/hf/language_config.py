"""A language model's settings, from and to its part of config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megavlm.config.schema import Language
from megavlm.convert.hf import gpt_oss_config, opt_config
from megavlm.convert.hf.json_files import (
    CAUSAL,
    SIZES,
    compressed_rotary_problems,
    contradictions,
    group_problems,
    layer_type_problems,
    layer_types,
    missing,
    named,
    no_flags,
    no_positive_numbers,
    no_sizes,
    rotary_problems,
    rotary_settings,
)
from megavlm.convert.hf.token_ids import TextIds
from megavlm.convert.weights.families import FAMILIES
from megavlm.convert.weights.families.family import Family

# Families whose settings have a module of their own.
_OF_THEIR_OWN = {"opt": opt_config, "gpt_oss": gpt_oss_config}
_NEEDED = (*SIZES, "vocab_size", "max_position_embeddings")
_STATED_BY_SOME = ("num_key_value_heads", "head_dim")
# Fields about experts that config.json need not state.
_UNSTATED = {"norm_topk_prob": False, "routed_scaling": 1.0}
# Fields of what a family states whose numbers have a point, and may be null.
_NULLABLE = ("attention_softcap", "final_softcap")


def problems(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Why a language model is none of those that can be trained here.

    Args:
        settings: the model's part of config.json.
        section: name of that part.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        yield f"{section}.model_type is {kind!r}, must be one of {', '.join(FAMILIES)}"
        return
    yield from contradictions(section, settings, CAUSAL)
    if kind in _OF_THEIR_OWN:
        yield from _OF_THEIR_OWN[kind].problems(settings, section)
        return
    family = FAMILIES[kind]
    settings = _with_experts(settings)
    yield from missing(section, settings, *_NEEDED, family.norm_epsilon)
    needed = [name for field, name in family.expert_names.items() if field not in _UNSTATED]
    yield from missing(section, settings, *needed, *_needed_of(family))
    unreadable = list(_unreadable(settings, section, family, needed))
    if unreadable:
        yield from unreadable
        return
    stated = {
        name: value
        for name, value in settings.items()
        if value not in family.accepted.get(name, ())
    }
    yield from contradictions(section, stated, family.settings)
    if family.facts["window_attn_skip_freq"]:
        yield from layer_type_problems(section, settings)
    rotary = _rotary(settings)
    if rotary["rope_type"] not in ("default", "dynamic"):
        yield (
            f"{section}: rotary positions are of type {rotary['rope_type']!r}, must be 'default' or"
            " 'dynamic'"
        ).removeprefix(": ")
    if rotary["rope_type"] == "dynamic":
        yield from compressed_rotary_problems(section, rotary)
    rotated = family.facts["rotary_percent"]
    if rotary.get("partial_rotary_factor", rotated) != rotated:
        yield (
            f"{named(section, 'partial_rotary_factor')} is {rotary['partial_rotary_factor']},"
            f" must be {rotated}"
        )
    if not family.has_head_dim:
        yield from _head_dim_problems(settings, section)
    if family.has_groups and settings.get("num_attention_heads"):
        yield from group_problems(section, settings)


def _head_dim_problems(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield that heads are not as wide as in a family whose files do not state their width."""
    heads = settings.get("num_attention_heads") or 1
    width = settings.get("hidden_size") or 0
    if width % heads:
        yield (
            f"{named(section, 'hidden_size')} is {width}, must be a multiple of"
            f" num_attention_heads {heads}"
        )
    elif settings.get("head_dim") not in (None, width / heads):
        yield (
            f"{named(section, 'head_dim')} is {settings['head_dim']}, must be hidden_size /"
            f" num_attention_heads = {width / heads:g}"
        )


def _needed_of(family: Family) -> list[str]:
    """Return the names of further settings that a family's config.json must state."""
    return [name for field, name in family.stated.items() if field not in _NULLABLE]


def _unreadable(
    settings: Mapping[str, Any], section: str, family: Family, of_experts: Sequence[str]
) -> Iterator[str]:
    """Yield settings whose values are of another kind than ``read`` takes."""
    yield from no_sizes(section, settings, *_NEEDED, *_STATED_BY_SOME)
    shared = family.expert_names.get("shared_expert_ffn_hidden_size", "")
    yield from no_sizes(section, settings, *(name for name in of_experts if name != shared))
    yield from no_sizes(section, settings, shared, least=0)
    yield from no_sizes(section, settings, *_needed_of(family))
    caps = [family.stated[field] for field in _NULLABLE if field in family.stated]
    yield from no_positive_numbers(section, settings, *caps)
    scaling = family.expert_names.get("routed_scaling", "")
    yield from no_positive_numbers(section, settings, family.norm_epsilon, scaling)
    yield from rotary_problems(section, settings)
    yield from no_flags(section, settings, family.expert_names.get("norm_topk_prob", ""))


def read(settings: Mapping[str, Any], *, tied_head: bool) -> Language:
    """Read a language model.

    Args:
        settings: the model's part of config.json, without problems.
        tied_head: whether the head is the token embedding.
    """
    if settings["model_type"] in _OF_THEIR_OWN:
        return _OF_THEIR_OWN[settings["model_type"]].read(settings, tied_head=tied_head)
    settings = _with_experts(settings)
    family = FAMILIES[settings["model_type"]]
    width = settings["hidden_size"]
    heads = settings["num_attention_heads"]
    rotary = _rotary(settings)
    head_size = settings.get("head_dim") or width // heads
    return Language(
        family=family.name,
        num_layers=settings["num_hidden_layers"],
        hidden_size=width,
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=settings.get("num_key_value_heads") or heads,
        kv_channels=0 if head_size * heads == width else head_size,
        vocab_size=settings["vocab_size"],
        rotary_base=float(rotary["rope_theta"]),
        rotary_dynamic_factor=float(rotary.get("factor", 1.0)),
        layernorm_epsilon=settings[family.norm_epsilon],
        max_position_embeddings=settings["max_position_embeddings"],
        tied_head=tied_head,
        **family.facts,
        **{field: settings.get(name) or 0 for field, name in family.stated.items()},
        **_read_experts(settings),
    )


def read_bare(settings: Mapping[str, Any], *, tied_head: bool) -> Language:
    """Read a language model that a class builds without its head. The class computes logits itself,
    and no soft cap of them, whatever config.json says.
    """
    return replace(read(settings, tied_head=tied_head), final_softcap=0.0)


def _with_experts(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with the name of the number of experts that the family has, which
    transformers 5 writes as ``num_local_experts``.
    """
    name = FAMILIES[settings["model_type"]].expert_names.get("num_experts", "num_experts")
    return {**settings, name: settings.get(name, settings.get("num_local_experts"))}


def _read_experts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of ``Language`` about experts; none if the model has none."""
    family = FAMILIES[settings["model_type"]]
    # transformers leaves weights as they are if the file says nothing.
    found = {
        field: _UNSTATED.get(field) if settings.get(name) is None else settings[name]
        for field, name in family.expert_names.items()
    }
    if family.counts_shared:
        found["shared_expert_ffn_hidden_size"] *= found["expert_ffn_hidden_size"]
    return found


def _write_experts(language: Language, family: Family) -> dict[str, Any]:
    """Write the fields of ``Language`` about experts; nothing if the model has none."""
    fields = vars(language)
    found = {name: fields[field] for field, name in family.expert_names.items()}
    if family.counts_shared:
        name = family.expert_names["shared_expert_ffn_hidden_size"]
        found[name] //= language.expert_ffn_hidden_size
    return found


def _rotary(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings of rotary positions into one mapping; transformers 4 keeps the base apart
    from the rest, transformers 5 does not.
    """
    scaling = rotary_settings(settings)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = scaling.get("rope_theta") or settings.get("rope_theta") or 1e4
    found = {"rope_type": kind, "rope_theta": base}
    partial = scaling.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if partial is not None:
        found["partial_rotary_factor"] = partial
    # Plain positions have no use for a factor.
    return found | ({"factor": scaling.get("factor")} if kind == "dynamic" else {})


def write(language: Language, family: Family, ids: TextIds) -> dict[str, Any]:
    """Return a language model's part of config.json.

    Args:
        language: the model.
        family: in whose format it is written.
        ids: of the tokens that it names.
    """
    own = _OF_THEIR_OWN.get(family.name)
    sizes = own.write(language) if own else _write_sizes(language, family)
    return {
        "architectures": [family.class_name],
        "model_type": family.name,
        **family.settings,
        **sizes,
        "tie_word_embeddings": language.tied_head,
        **ids.text,
    }


def _write_sizes(language: Language, family: Family) -> dict[str, Any]:
    """Write the sizes of a language model of Llama's kind."""
    return {
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        **({"num_key_value_heads": language.num_query_groups} if family.has_groups else {}),
        **({"head_dim": language.head_size} if family.has_head_dim else {}),
        "vocab_size": language.vocab_size,
        family.norm_epsilon: language.layernorm_epsilon,
        "max_position_embeddings": language.max_position_embeddings,
        **{name: vars(language)[field] or None for field, name in family.stated.items()},
        **({"layer_types": layer_types(language.num_layers)} if language.window_size else {}),
        **_write_experts(language, family),
        **_write_rotary(language),
    }


def _write_rotary(language: Language) -> dict[str, Any]:
    """Write the rotary positions for transformers 4 (and remote code, which accepts no third entry
    in ``rope_scaling``) and for 5.
    """
    factor = language.rotary_dynamic_factor
    base = language.rotary_base
    partial = language.rotary_percent
    part = {"partial_rotary_factor": partial} if partial < 1 else {}
    if factor == 1:
        plain = {"rope_type": "default", "rope_theta": base, **part}
        return {"rope_theta": base, "rope_parameters": plain, **part}
    return {
        "rope_theta": base,
        "rope_scaling": {"type": "dynamic", "factor": factor},
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": base, "factor": factor, **part},
        **part,
    }
