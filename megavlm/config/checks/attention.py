"""Cross checks of a language model's attention: sinks, sliding windows, soft caps and YaRN."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.architecture import WINDOWED_FAMILIES, Architecture
from megavlm.config.checks.limits import at_least
from megavlm.config.differences import changed
from megavlm.config.schema import Language

_FLAG = "--architecture.language"


def attention_problems(arch: Architecture) -> Iterator[str]:
    """Yield what attention cannot be."""
    language = arch.language
    yield from at_least(
        0, "architecture.language", language, "window_size", "window_attn_skip_freq"
    )
    if language.window_size and language.family not in WINDOWED_FAMILIES:
        yield (
            f"{_FLAG}.window_size {language.window_size}: a model of {_FLAG}.family"
            f" {language.family} has no sliding windows, as {' and '.join(WINDOWED_FAMILIES)} have;"
            " use 0"
        )
    if language.window_attn_skip_freq == 1:
        yield f"{_FLAG}.window_attn_skip_freq 1: no layer would have a window; use 0 or 2"
    if language.window_attn_skip_freq and not language.window_size:
        yield (
            f"{_FLAG}.window_attn_skip_freq {language.window_attn_skip_freq} has no effect without"
            f" {_FLAG}.window_size, such as 128"
        )
    if language.linear_bias and language.has_layer_norm:
        yield (
            f"{_FLAG}.linear_bias true has no effect: {_FLAG}.family {language.family} has biases"
            " everywhere; use false"
        )
    if language.attention_sinks:
        yield from _sinks(arch)
    yield from _caps(arch)
    yield from _yarn(language)


def _sinks(arch: Architecture) -> Iterator[str]:
    """Yield what does not go with sinks."""
    flag = f"{_FLAG}.attention_sinks true"
    if arch.language.is_encoder:
        yield f"{flag}: {_FLAG}.family {arch.language.family} is a text encoder; use false"
    if arch.prefix_lm:
        yield f"{flag}: attention with sinks is causal; use --architecture.prefix_lm false"
    if arch.cross_attention.every:
        yield (
            f"{flag}: layers with gated cross-attention (--architecture.cross_attention.every"
            f" {arch.cross_attention.every}) have not been tried with sinks; use false"
        )


def _caps(arch: Architecture) -> Iterator[str]:
    """Yield what soft caps and norms behind branches cannot be."""
    language = arch.language
    names = ("attention_softcap", "final_softcap", "query_pre_attn_scalar")
    yield from at_least(0, "architecture.language", language, *names)
    given = changed(language, *names, "sandwich_norm")
    name, value = next(iter(given.items()), ("", None))
    if not given:
        return
    flag = f"{_FLAG}.{name} {str(value).lower()}"
    if language.family != "gemma2":
        yield (
            f"{flag}: a model of {_FLAG}.family {language.family} has none, as gemma2 has; leave it"
            " out"
        )
    elif arch.cross_attention.every:
        yield (
            f"{flag}: layers with gated cross-attention (--architecture.cross_attention.every"
            f" {arch.cross_attention.every}) have no norms behind their branches; use another"
            " language model"
        )
    if language.final_softcap and not arch.needs.has_vocabulary_head:
        yield (
            f"{_FLAG}.final_softcap {language.final_softcap} has no effect:"
            f" --architecture.objective {arch.objective} has no head over the vocabulary; use 0"
        )


def _yarn(language: Language) -> Iterator[str]:
    """Yield what YaRN cannot be."""
    factor = language.rotary_yarn_factor
    flag = f"{_FLAG}.rotary_yarn_factor {factor}"
    if factor == 1:
        for name, value in changed(
            language, "rotary_yarn_positions", "rotary_yarn_truncate"
        ).items():
            yield (
                f"{_FLAG}.{name} {str(value).lower()} has no effect without"
                f" {_FLAG}.rotary_yarn_factor, such as 32"
            )
        return
    yield from at_least(1, "architecture.language", language, "rotary_yarn_factor")
    yield from at_least(1, "architecture.language", language, "rotary_yarn_positions")
    if language.has_learned_positions:
        yield f"{flag}: {_FLAG}.family {language.family} has no rotary positions; use 1"
    if language.rotary_dynamic_factor != 1:
        yield (
            f"{flag}: {_FLAG}.rotary_dynamic_factor {language.rotary_dynamic_factor} stretches"
            " positions in another way; use 1 for one of them"
        )
    if language.rotary_percent != 1:
        yield (
            f"{flag}: {_FLAG}.rotary_percent {language.rotary_percent}: YaRN rotates whole heads;"
            " use 1 for one of them"
        )
