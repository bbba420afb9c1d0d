"""Cross checks of what a model is made of."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config import cross_attention
from megavlm.config.architecture import GATED
from megavlm.config.checks import whole_images
from megavlm.config.checks.attention import attention_problems
from megavlm.config.checks.experts import expert_size_problems
from megavlm.config.checks.limits import at_least
from megavlm.config.checks.no_vision import model_problems
from megavlm.config.connectors import WITH_NEWLINES
from megavlm.config.differences import changed
from megavlm.config.schema import NO_LANGUAGE, Architecture


def architecture_problems(arch: Architecture) -> list[str]:
    """List everything in a model that cannot be."""
    vision = arch.vision
    language = arch.language
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    found = [
        *at_least(1, "architecture.vision", vision, "image_size", "patch_size", *sizes[1:]),
        *at_least(
            0, "architecture.vision", vision, "num_layers", "unused_layers", "layernorm_epsilon"
        ),
        *at_least(0, "architecture.language", language, "num_layers"),
        *at_least(
            1,
            "architecture.language",
            language,
            *sizes[1:],
            "num_query_groups",
            "vocab_size",
            "max_position_embeddings",
        ),
        *at_least(0, "architecture.language", language, "kv_channels", "layernorm_epsilon"),
        *at_least(1, "architecture.language", language, "rotary_base", "rotary_dynamic_factor"),
        *expert_size_problems(language),
    ]
    found += _connector(arch)
    if not found:
        found += [*_vision(arch), *_parts(arch), *model_problems(arch)]
        found += whole_images.model_problems(arch)
        found += [*_vocabulary(arch), *(_language(arch) if language.exists else ())]
        found += cross_attention.problems(arch)
    return found


def _parts(arch: Architecture) -> Iterator[str]:
    """Yield whether there is a language model that the objective has none of, or none that it
    needs.
    """
    language = arch.language
    objective = f"--architecture.objective {arch.objective}"
    if arch.needs.has_language and not language.exists:
        yield f"--architecture.language.num_layers 0: {objective} needs a language model"
    elif not arch.needs.has_language and language != NO_LANGUAGE:
        name, value = next(iter(changed(language, usual=NO_LANGUAGE).items()))
        yield (
            f"--architecture.language.{name} {value}: {objective} has no language model; leave it"
            f" out, or use {vars(NO_LANGUAGE)[name]}"
        )


def _vocabulary(arch: Architecture) -> Iterator[str]:
    """Yield what keeps rows of the vocabulary from being parameters of their own, and prefixes
    from having answers behind them.
    """
    if arch.prefix_lm and not arch.needs.has_vocabulary_head:
        yield (
            f"--architecture.prefix_lm true: --architecture.objective {arch.objective} has no"
            " answers; use false"
        )
    flag = f"--architecture.added_tokens {arch.added_tokens}"
    if not 0 <= arch.added_tokens < arch.language.vocab_size:
        yield (
            f"{flag}: must be 0 or more, and less than --architecture.language.vocab_size"
            f" {arch.language.vocab_size}"
        )
    elif arch.added_tokens and arch.language.tied_head:
        yield (
            f"{flag}: the rows are parameters of embedding and head each; use"
            " --architecture.language.tied_head false (a tied head then starts as a copy)"
        )
    elif arch.added_tokens and not arch.needs.has_vocabulary_head:
        yield (
            f"{flag}: --architecture.objective {arch.objective} has no head over the vocabulary;"
            " use 0"
        )


def _vision(arch: Architecture) -> Iterator[str]:
    vision = arch.vision
    flag = "--architecture.vision"
    if not vision.fills_tile:
        yield (
            f"{flag}.patch_size {vision.patch_size} does not divide {flag}.image_size"
            f" {vision.image_size}"
        )
    if vision.hidden_size % vision.num_attention_heads:
        yield (
            f"{flag}.num_attention_heads {vision.num_attention_heads} does not divide"
            f" {flag}.hidden_size {vision.hidden_size}"
        )
    if vision.final_norm and vision.family not in ("clip", "siglip"):
        yield (
            f"{flag}.final_norm true: a vision encoder of {flag}.family {vision.family} has no norm"
            " behind its last layer; use false"
        )
    if vision.final_norm and vision.unused_layers:
        yield (
            f"{flag}.final_norm true: the norm stands behind the last layer, so use"
            f" {flag}.unused_layers 0; it is {vision.unused_layers}"
        )
    if vision.unused_head and vision.family != "siglip":
        yield (
            f"{flag}.unused_head true: files of a vision encoder of {flag}.family {vision.family}"
            " hold no head; use false"
        )
    if not 0 <= vision.patch_drop < 1:
        yield f"{flag}.patch_drop {vision.patch_drop}: must be 0 or more, and less than 1"
    elif vision.patch_drop and not (vision.exists and arch.needs.takes_one_embedding):
        why = f"--architecture.objective {arch.objective} reads every patch"
        if not vision.exists:
            why = "there is no vision encoder"
        yield f"{flag}.patch_drop {vision.patch_drop}: {why}; use 0"
    if min(vision.pixel_std) <= 0:
        yield f"{flag}.pixel_std {','.join(map(str, vision.pixel_std))}: must be above 0"


def _connector(arch: Architecture) -> Iterator[str]:
    vision = arch.vision
    if vision.patch_size > 0 and not vision.fills_tile:
        return  # reported by itself
    try:
        sizes = arch.connector_sizes
    except ValueError as error:
        yield str(error)
        return
    problems = list(sizes.problems())
    yield from problems
    if problems:
        return
    if arch.connector.newline and arch.connector.kind not in WITH_NEWLINES:
        yield (
            f"--architecture.connector.newline true: a connector of --architecture.connector.kind"
            f" {arch.connector.kind} gives no rows of features; use false, or"
            f" {' or '.join(WITH_NEWLINES)}"
        )
    yield from arch.needs.problems(arch)
    if arch.needs.takes_one_embedding:
        yield from _pairs(arch)
    elif arch.cross_attention.every > 0:
        if sizes.placeholders != 1:
            yield (
                f"--architecture.connector.kind {arch.connector.kind}: has {sizes.placeholders}"
                " placeholder tokens for a tile, and cross-attention"
                f" (--architecture.cross_attention.every {arch.cross_attention.every}) reads tiles"
                " that have one; use resampler"
            )
    elif arch.needs.has_language and sizes.placeholders != sizes.features:
        yield (
            f"--architecture.connector.kind {arch.connector.kind}: gives {sizes.features} features"
            f" for the {sizes.placeholders} placeholder tokens of a tile; the language model takes"
            " one for each, so choose a connector that gives as many"
        )


def _pairs(arch: Architecture) -> Iterator[str]:
    """Yield what keeps a model from being trained on pairs of an image and its text."""
    sizes = arch.connector_sizes
    kind = arch.connector.kind
    flag = f"--architecture.connector.kind {kind}"
    if (sizes.features, sizes.placeholders) != (1, 0):
        yield (
            f"{flag}: gives {sizes.features} features of a tile, and --architecture.objective"
            f" {arch.objective} takes one embedding; use class_token, mean, attention or mean_query"
        )
    if kind == "class_token" and not arch.vision.has_class_token:
        yield (
            f"{flag}: a vision encoder of --architecture.vision.family {arch.vision.family} has no"
            " class token; use mean or attention"
        )
    if arch.language.tied_head:
        yield (
            f"--architecture.language.tied_head true: --architecture.objective {arch.objective} has"
            " no head over the vocabulary; use false"
        )
    if arch.contrastive.exchange == "ring" and arch.contrastive.loss != "sigmoid":
        yield (
            "--architecture.contrastive.exchange ring: the loss softmax of a pair needs the"
            " similarities of all pairs at once; use gather, or --architecture.contrastive.loss"
            " sigmoid"
        )
    yield from at_least(1, "architecture.contrastive", arch.contrastive, "size")
    yield from at_least(0, "architecture.contrastive", arch.contrastive, "max_scale")


def _language(arch: Architecture) -> Iterator[str]:
    language = arch.language
    flag = "--architecture.language"
    if language.has_layer_norm == language.is_gated:
        plain = "gelu, gelu_tanh, quick_gelu, relu or relu2"
        usual = plain if language.has_layer_norm else " or ".join(GATED)
        yield (
            f"{flag}.activation {language.activation}: {flag}.family {language.family} needs"
            f" {usual}"
        )
    if language.is_encoder and arch.needs.has_vocabulary_head:
        yield (
            f"{flag}.family {language.family}: a text encoder has no head over the vocabulary,"
            f" which --architecture.objective {arch.objective} needs; use a language model"
        )
    if arch.image_tokens == "none" and not arch.needs.is_of_pairs:
        yield (
            f"--architecture.image_tokens none: --architecture.objective {arch.objective} has"
            " images among the tokens, and needs some that stand for them"
        )
    yield from attention_problems(arch)
    heads = language.num_attention_heads
    groups = language.num_query_groups
    if not language.kv_channels and language.hidden_size % heads:
        yield (
            f"{flag}.num_attention_heads {heads} does not divide {flag}.hidden_size"
            f" {language.hidden_size}; or give {flag}.kv_channels"
        )
    elif language.head_size % 2 and not language.has_learned_positions:
        name = "kv_channels" if language.kv_channels else "hidden_size"
        yield (
            f"{flag}.{name} {vars(language)[name]}: {language.head_size} a head, and rotary"
            " positions need an even number"
        )
    elif not language.has_learned_positions:
        rotated = language.rotary_percent * language.head_size
        if not 0 < language.rotary_percent <= 1 or rotated % 2:
            yield (
                f"{flag}.rotary_percent {language.rotary_percent}: must be above 0 and at most 1,"
                f" and give an even part of the {language.head_size} of a head"
            )
    if heads % groups:
        yield f"{flag}.num_query_groups {groups} does not divide {flag}.num_attention_heads {heads}"
