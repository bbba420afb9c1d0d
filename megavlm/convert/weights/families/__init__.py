"""The families of language models, a module for each. A new one is a new module and its name in the
list below.
"""

from __future__ import annotations

from megavlm.config.schema import Language
from megavlm.convert.weights.families import (
    dots1,
    gemma,
    gemma2,
    gpt_oss,
    internlm2,
    internlm3,
    llama,
    mistral,
    opt,
    persimmon,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megavlm.convert.weights.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        qwen2,
        qwen3,
        qwen2_moe,
        qwen3_moe,
        dots1,
        internlm2,
        internlm3,
        llama,
        mistral,
        gemma,
        gemma2,
        opt,
        persimmon,
        phi3,
        gpt_oss,
    )
}


def family_of(language: Language) -> Family:
    """Return the family that a language model names.

    Raises:
        ValueError: there is no such family, or the model contradicts what all models of the family
            share; every flag is named.
    """
    flag = "--architecture.language"
    if language.family not in FAMILIES:
        raise ValueError(
            f"{flag}.family {language.family}: no such family; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[language.family]
    fields = vars(language)
    wrong = [
        (name, fields[name], value) for name, value in family.facts.items() if fields[name] != value
    ]
    if (
        not family.has_head_dim
        and language.head_size * language.num_attention_heads != language.hidden_size
    ):
        wrong.append(("kv_channels", language.kv_channels, 0))
    if not family.has_groups and language.num_query_groups != language.num_attention_heads:
        groups = language.num_query_groups
        wrong.append(("num_query_groups", groups, language.num_attention_heads))
    if family.has_experts != (language.num_experts > 0):
        wrong.append(
            ("num_experts", language.num_experts, "1 or more" if family.has_experts else 0)
        )
    if family.has_shared_expert != (language.shared_expert_ffn_hidden_size > 0):
        size = language.shared_expert_ffn_hidden_size
        wrong.append(
            (
                "shared_expert_ffn_hidden_size",
                size,
                "1 or more" if family.has_shared_expert else 0,
            )
        )
    if family.counts_shared and (
        language.shared_expert_ffn_hidden_size % max(language.expert_ffn_hidden_size, 1)
    ):
        size = language.shared_expert_ffn_hidden_size
        wrong.append(
            ("shared_expert_ffn_hidden_size", size, "a multiple of expert_ffn_hidden_size")
        )
    if wrong:
        listed = "; ".join(
            f"{flag}.{name} is {str(found).lower()}, must be {str(value).lower()}"
            for name, found, value in wrong
        )
        raise ValueError(f"{flag}.family {language.family}: {listed}")
    return family


def written_as(language: Language, dialect: str) -> Family:
    """Return the family in whose format a dialect writes a language model.

    Raises:
        ValueError: see ``family_of``.
    """
    family = family_of(language)
    return FAMILIES[(family.chat if dialect == "chat" else family.native) or family.name]
