"""Which models each format of Hugging Face folders can hold.

A format's other facts stand in ``megavlm/convert/hf/hub_formats.py``, under the same names. This
one is known here, so that a run that could not export its model is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from megavlm.config.architecture import Architecture

# Language models that the code of ``InternVLChatModel`` knows; a Mistral is written as a Llama.
_CHAT_FAMILIES = (
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "internlm2",
    "internlm3",
    "llama",
    "mistral",
    "phi3",
    "gpt_oss",
)

# Language models that the code of ``PaliGemmaForConditionalGeneration`` puts a prefix in front of.
PALIGEMMA_FAMILIES = ("gemma", "gemma2")


def _without_crosses(arch: Architecture) -> Iterator[str]:
    """Yield what only IDEFICS's class has, PaliGemma's and LLaVA-NeXT's."""
    yield from _no_crosses(arch)
    yield from _causal(arch)


def _no_crosses(arch: Architecture) -> Iterator[str]:
    if arch.cross_attention.every or arch.added_tokens:
        yield (
            "only IdeficsForVisionText2Text has cross-attention layers and added tokens; this model"
            f" has --architecture.cross_attention.every {arch.cross_attention.every} and"
            f" --architecture.added_tokens {arch.added_tokens}"
        )


def _causal(arch: Architecture) -> Iterator[str]:
    """Yield what only PaliGemma's class computes, and LLaVA-NeXT's."""
    yield from _no_newline(arch)
    yield from _one_way(arch)


def _no_newline(arch: Architecture) -> Iterator[str]:
    if arch.connector.newline:
        yield (
            "only LlavaNextForConditionalGeneration and LlavaOnevisionForConditionalGeneration end"
            " rows of features with a learned embedding; this model has"
            " --architecture.connector.newline true"
        )


def _one_way(arch: Architecture) -> Iterator[str]:
    """Yield what only PaliGemma's class computes."""
    if arch.prefix_lm:
        yield (
            "only PaliGemmaForConditionalGeneration lets the tokens of a prefix see each other;"
            " this model has --architecture.prefix_lm true"
        )
    if arch.vision.final_norm:
        yield (
            "only PaliGemmaForConditionalGeneration has features from behind the last norm of a"
            " vision encoder; this model has --architecture.vision.final_norm true"
        )


def _internvl(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    connector = arch.connector
    if arch.objective != "next_token":
        yield f"InternVL's formats hold no model of --architecture.objective {arch.objective}"
    elif arch.vision.family != "internvit" or connector.kind != "mlp" or not connector.norm:
        yield (
            "InternVL's formats hold --architecture.vision.family internvit with"
            " --architecture.connector.kind mlp and --architecture.connector.norm true; this model"
            f" is {arch.vision.family} with {connector.kind} and {str(connector.norm).lower()}"
        )
    elif not connector.bias:
        yield "InternVL's formats have --architecture.connector.bias true; this model has false"
    if arch.image_tokens != "internvl":
        yield (
            "InternVL's formats have the image tokens of --architecture.image_tokens internvl; this"
            f" model has those of {arch.image_tokens}"
        )


def _native(arch: Architecture) -> Iterator[str]:
    yield from _internvl(arch)
    yield from _bare_language("InternVLForConditionalGeneration", arch)


def _bare_language(name: str, arch: Architecture) -> Iterator[str]:
    """Yield what a class has no place for that builds a language model without its head, and
    computes logits itself.
    """
    language = arch.language
    if language.family == "opt":
        yield f"{name} cannot be built with --architecture.language.family opt, as this model is"
    if language.final_softcap:
        yield (
            f"{name} computes logits without a soft cap, --architecture.language.final_softcap 0;"
            f" this model has {language.final_softcap}"
        )


def _chat(arch: Architecture) -> Iterator[str]:
    yield from _internvl(arch)
    wanted = {"vision.resample": ("bicubic", arch.vision.resample)}
    yield from _other_values("InternVLChatModel", wanted)
    if arch.language.family not in _CHAT_FAMILIES:
        yield (
            "InternVLChatModel has a language model of --architecture.language.family"
            f" {', '.join(_CHAT_FAMILIES)}; this model has {arch.language.family}"
        )


def _llava(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    yield from _llava_parts("LlavaForConditionalGeneration", arch)


def _llava_with_rows(name: str, arch: Architecture) -> Iterator[str]:
    """Yield what a class of LLaVA-NeXT's kind has no place for."""
    yield from _no_crosses(arch)
    yield from _one_way(arch)
    yield from _llava_parts(name, arch)
    if not arch.connector.newline:
        yield f"{name} has --architecture.connector.newline true; this model has false"


def _llava_parts(name: str, arch: Architecture) -> Iterator[str]:
    """Yield what a class of LLaVA's kind has no place for."""
    connector = arch.connector
    shuffles = connector.kind == "mlp" and (connector.pixel_shuffle != 1 or connector.norm)
    if arch.vision.family not in ("clip", "siglip"):
        yield (
            f"{name} is written with --architecture.vision.family clip or"
            f" siglip; this model has {arch.vision.family}"
        )
    if connector.kind not in ("mlp", "linear") or shuffles:
        yield (
            f"{name} has --architecture.connector.kind linear, or mlp with"
            " --architecture.connector.pixel_shuffle 1 and --architecture.connector.norm false;"
            f" this model has {connector.kind} with {connector.pixel_shuffle} and"
            f" {str(connector.norm).lower()}"
        )
    if arch.image_tokens != "llava":
        yield (
            f"{name} has the image token of --architecture.image_tokens"
            f" llava; this model has those of {arch.image_tokens}"
        )
    yield from _bare_language(name, arch)


def _blip2(arch: Architecture) -> Iterator[str]:
    name = "Blip2ForConditionalGeneration"
    yield from _without_crosses(arch)
    yield from _blip2_parts(name, arch)
    if arch.objective != "next_token":
        yield f"{name} holds no model of --architecture.objective {arch.objective}"
    if arch.connector.qformer.text:
        yield f"{name} has --architecture.connector.qformer.text false; this model has true"
    if arch.image_tokens != "llava":
        yield (
            f"{name} has the image token of --architecture.image_tokens llava; this model has"
            f" those of {arch.image_tokens}"
        )


def _instructblip(arch: Architecture) -> Iterator[str]:
    name = "InstructBlipForConditionalGeneration"
    yield from _without_crosses(arch)
    yield from _blip2_parts(name, arch)
    wanted = {
        "objective": ("next_token", arch.objective),
        "connector.qformer.text": (True, arch.connector.qformer.text),
        "image_tokens": ("llava", arch.image_tokens),
    }
    yield from _other_values(name, wanted)
    if not arch.connector.instruction_tokens:
        yield (
            f"{name} has a Q-Former that reads instructions; this model has"
            " --architecture.connector.qformer.instruction_tokens 0"
        )


def _blip2_retrieval(arch: Architecture) -> Iterator[str]:
    name = "Blip2ForImageTextRetrieval"
    yield from _blip2_parts(name, arch)
    if arch.objective != "qformer":
        yield (
            f"{name} holds models of --architecture.objective qformer; this one is of"
            f" {arch.objective}"
        )


def _blip2_parts(name: str, arch: Architecture) -> Iterator[str]:
    """Yield what a class of BLIP-2 has no place for in vision encoder and connector."""
    vision = arch.vision
    if vision.family != "eva" or arch.connector.kind != "qformer":
        yield (
            f"{name} has --architecture.vision.family eva and --architecture.connector.kind"
            f" qformer; this model has {vision.family} and {arch.connector.kind}"
        )
    facts = (vision.normalization, vision.activation, vision.qk_norm)
    if facts != ("LayerNorm", "gelu", False):
        yield (
            f"{name} has --architecture.vision.normalization LayerNorm, activation gelu and qk_norm"
            f" false; this model has {', '.join(map(str, facts)).lower()}"
        )


def _paligemma(arch: Architecture) -> Iterator[str]:
    wanted = {
        "objective": ("next_token", arch.objective),
        "cross_attention.every": (0, arch.cross_attention.every),
        "prefix_lm": (True, arch.prefix_lm),
        "image_tokens": ("paligemma", arch.image_tokens),
        "connector.newline": (False, arch.connector.newline),
        "vision.family": ("siglip", arch.vision.family),
        "vision.final_norm": (True, arch.vision.final_norm),
        "vision.unused_layers": (0, arch.vision.unused_layers),
        "vision.unused_head": (False, arch.vision.unused_head),
        "connector.kind": ("linear", arch.connector.kind),
        "connector.bias": (True, arch.connector.bias),
    }
    yield from _other_values("PaliGemmaForConditionalGeneration", wanted)
    if arch.language.family not in PALIGEMMA_FAMILIES:
        yield (
            "PaliGemmaForConditionalGeneration has --architecture.language.family"
            f" {' or '.join(PALIGEMMA_FAMILIES)}; this model has {arch.language.family}"
        )


def _fuyu(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    vision = arch.vision
    wanted = {
        "objective": ("next_token", arch.objective),
        "image_tokens": ("fuyu", arch.image_tokens),
        "vision.num_layers": (0, vision.num_layers),
        "vision.image_size": (vision.patch_size, vision.image_size),
        "connector.kind": ("linear", arch.connector.kind),
        "connector.bias": (True, arch.connector.bias),
        "language.family": ("persimmon", arch.language.family),
        "language.tied_head": (False, arch.language.tied_head),
    }
    yield from _other_values("FuyuForCausalLM", wanted)


def _other_values(name: str, wanted: dict[str, tuple[object, object]]) -> Iterator[str]:
    """Yield fields that have another value than a class of transformers holds; ``wanted`` has the
    class's value and the model's by the name of the field.
    """
    for field, (value, found) in wanted.items():
        if found != value:
            yield (
                f"{name} has --architecture.{field} {str(value).lower()}; this model has"
                f" {str(found).lower()}"
            )


def _clip(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    is_one = arch.vision.family == "clip" and arch.language.family == "clip_text"
    ends = arch.contrastive
    if not (is_one and arch.connector.kind == "class_token" and ends.loss == "softmax"):
        yield _other_pairs("CLIPModel", "clip with clip_text, class_token and softmax", arch)
    elif ends.text_bias:
        yield "CLIPModel has no --architecture.contrastive.text_bias; use false"


def _siglip(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    is_one = arch.vision.family == "siglip" and arch.language.family == "siglip_text"
    ends = arch.contrastive
    if not (is_one and arch.connector.kind == "attention" and ends.loss == "sigmoid"):
        yield _other_pairs("SiglipModel", "siglip with siglip_text, attention and sigmoid", arch)
    elif not ends.text_bias:
        yield "SiglipModel has --architecture.contrastive.text_bias true; use it"


def _internvl_c(arch: Architecture) -> Iterator[str]:
    yield from _without_crosses(arch)
    wanted = {
        "objective": ("contrastive", arch.objective),
        "contrastive.loss": ("softmax", arch.contrastive.loss),
        "contrastive.text_bias": (False, arch.contrastive.text_bias),
        "vision.family": ("internvit", arch.vision.family),
        "connector.kind": ("mean_query", arch.connector.kind),
    }
    yield from _other_values("InternVL_C", wanted)
    if arch.language.is_encoder:
        yield (
            "InternVL_C has a language model as text encoder; this model has"
            f" --architecture.language.family {arch.language.family}"
        )


def _other_pairs(name: str, wanted: str, arch: Architecture) -> str:
    """Say that a class of transformers holds other encoders than a model's."""
    found = f"{arch.vision.family} with {arch.language.family}, {arch.connector.kind}"
    return (
        f"{name} has --architecture.vision.family, language.family, connector.kind and"
        f" contrastive.loss {wanted}; this model is {found} and {arch.contrastive.loss} of the"
        f" objective {arch.objective}"
    )


def _idefics(arch: Architecture) -> Iterator[str]:
    name = "IdeficsForVisionText2Text"
    language = arch.language
    yield from _causal(arch)
    wanted = {
        "objective": ("next_token", arch.objective),
        "vision.family": ("clip", arch.vision.family),
        "vision.unused_layers": (0, arch.vision.unused_layers),
        "connector.kind": ("resampler", arch.connector.kind),
    }
    if arch.image_tokens != "openflamingo":  # the same and one that stands in no image
        wanted["image_tokens"] = ("idefics", arch.image_tokens)
    yield from _other_values(name, wanted)
    every = arch.cross_attention.every
    if every < 1 or language.num_layers % every:
        yield (
            f"{name} has a --architecture.cross_attention.every that divides"
            f" --architecture.language.num_layers; this model has {every} and"
            f" {language.num_layers}"
        )
    inner = arch.connector.resampler.inner_size(arch.vision.hidden_size)
    if inner != 4 * arch.vision.hidden_size:
        yield (
            f"{name} has --architecture.connector.resampler.ffn_hidden_size"
            f" {4 * arch.vision.hidden_size}, four times the width of the vision encoder; this"
            f" model has {inner}"
        )
    if language.family != "llama":
        yield (
            f"{name} has a language model of --architecture.language.family llama; this model has"
            f" {language.family}"
        )
    if language.num_query_groups != language.num_attention_heads:
        yield (
            f"{name} has keys and values for each query head; this model has"
            f" --architecture.language.num_query_groups {language.num_query_groups} for"
            f" {language.num_attention_heads} heads"
        )
    if language.head_size * language.num_attention_heads != language.hidden_size:
        yield (
            f"{name} has heads of hidden_size / num_attention_heads; this model has"
            f" --architecture.language.kv_channels {language.kv_channels}"
        )
    if language.tied_head:
        yield f"{name} is written with --architecture.language.tied_head false; this model has true"


HOLDS: dict[str, Callable[[Architecture], Iterator[str]]] = {
    "native": _native,
    "chat": _chat,
    "llava": _llava,
    "llava_next": partial(_llava_with_rows, "LlavaNextForConditionalGeneration"),
    "llava_onevision": partial(_llava_with_rows, "LlavaOnevisionForConditionalGeneration"),
    "paligemma": _paligemma,
    "fuyu": _fuyu,
    "clip": _clip,
    "siglip": _siglip,
    "internvl_c": _internvl_c,
    "blip2": _blip2,
    "blip2_retrieval": _blip2_retrieval,
    "instructblip": _instructblip,
    "idefics": _idefics,
}
"""Yields, for each format, why it cannot hold a model."""
