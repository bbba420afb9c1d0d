"""Which models each format of Hugging Face folders can hold.

A format's other facts stand in ``megavlm/convert/hf/hub_formats.py``, under the same names. This
one is known here, so that a run that could not export its model is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

from megavlm.config.architecture import Architecture

PALIGEMMA_FAMILIES = ("gemma", "gemma2")
"""Language models that the code of ``PaliGemmaForConditionalGeneration`` puts a prefix in front
of.
"""


def _anything(arch: Architecture) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class Holds:
    """What a class of transformers, or of a model's own code, has a place for.

    Args:
        name: of the class.
        fields: the values that it can have of fields of ``--architecture``.
        beyond: yields what else a model lacks, as the end of "the class has".
    """

    name: str
    fields: Mapping[str, tuple[object, ...]]
    beyond: Callable[[Architecture], Iterator[str]] = _anything

    def __call__(self, arch: Architecture) -> Iterator[str]:
        """Yield why the class cannot hold a model, each with the flag to change."""
        for field, values in self.fields.items():
            found: object = reduce(lambda held, name: vars(held)[name], field.split("."), arch)
            if found not in values:
                yield (
                    f"{self.name} has --architecture.{field} {' or '.join(map(_text, values))};"
                    f" this model has {_text(found)}"
                )
        for text in self.beyond(arch):
            yield f"{self.name} has {text}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _no_opt(arch: Architecture) -> Iterator[str]:
    """Yield what a class lacks that builds a language model without its head."""
    if arch.language.family == "opt":
        yield "any --architecture.language.family but opt, which this model has"


def _of_llava(arch: Architecture) -> Iterator[str]:
    connector = arch.connector
    if connector.kind == "mlp" and (connector.pixel_shuffle != 1 or connector.norm):
        yield (
            "--architecture.connector.pixel_shuffle 1 and --architecture.connector.norm false for"
            f" an mlp; this model has {connector.pixel_shuffle} and {_text(connector.norm)}"
        )
    yield from _no_opt(arch)


def _instructions(arch: Architecture) -> Iterator[str]:
    if not arch.connector.instruction_tokens:
        yield (
            "a Q-Former that reads instructions; this model has"
            " --architecture.connector.qformer.instruction_tokens 0"
        )


def _one_patch(arch: Architecture) -> Iterator[str]:
    vision = arch.vision
    if vision.image_size != vision.patch_size:
        yield (
            f"--architecture.vision.image_size {vision.patch_size}, the size of a patch; this model"
            f" has {vision.image_size}"
        )


def _no_text_encoder(arch: Architecture) -> Iterator[str]:
    if arch.language.is_encoder:
        yield (
            "a language model as text encoder; this model has --architecture.language.family"
            f" {arch.language.family}"
        )


def _of_idefics(arch: Architecture) -> Iterator[str]:
    language = arch.language
    every = arch.cross_attention.every
    if every < 1 or language.num_layers % every:
        yield (
            "a --architecture.cross_attention.every that divides"
            f" --architecture.language.num_layers; this model has {every} and"
            f" {language.num_layers}"
        )
    inner = arch.connector.resampler.inner_size(arch.vision.hidden_size)
    if inner != 4 * arch.vision.hidden_size:
        yield (
            "--architecture.connector.resampler.ffn_hidden_size"
            f" {4 * arch.vision.hidden_size}, four times the width of the vision encoder; this"
            f" model has {inner}"
        )
    if language.num_query_groups != language.num_attention_heads:
        yield (
            "keys and values for each query head; this model has"
            f" --architecture.language.num_query_groups {language.num_query_groups} for"
            f" {language.num_attention_heads} heads"
        )
    if language.head_size * language.num_attention_heads != language.hidden_size:
        yield (
            "heads of hidden_size / num_attention_heads; this model has"
            f" --architecture.language.kv_channels {language.kv_channels}"
        )


def _of_qwen_vl(arch: Architecture) -> Iterator[str]:
    vision = arch.vision
    flag = "--architecture.vision"
    if not arch.language.rotary_sections:
        yield "--architecture.language.rotary_sections; this model has none"
    if vision.patch_size < 1 or vision.image_size % vision.patch_size:
        yield (
            f"tiles of whole patches; this model has {flag}.image_size {vision.image_size} and"
            f" {flag}.patch_size {vision.patch_size}"
        )


def _of_qwen2_vl(arch: Architecture) -> Iterator[str]:
    yield from _of_qwen_vl(arch)
    width = max(arch.vision.hidden_size, 1)
    if arch.vision.ffn_hidden_size % width:
        yield (
            f"--architecture.vision.ffn_hidden_size that is a multiple of hidden_size {width}; this"
            f" model has {arch.vision.ffn_hidden_size}"
        )


def _of_qwen2_5_vl(arch: Architecture) -> Iterator[str]:
    yield from _of_qwen_vl(arch)
    if not arch.vision.window_tiles:
        yield (
            f"--architecture.vision.window_size {arch.vision.image_size} or more, the size of a"
            f" tile; this model has {arch.vision.window_size}"
        )


_USUAL: dict[str, tuple[object, ...]] = {
    "cross_attention.every": (0,),
    "added_tokens": (0,),
    "connector.newline": (False,),
    "prefix_lm": (False,),
    "vision.final_norm": (False,),
}
# Tokens of most models know their place in the text alone.
_PLAIN = _USUAL | {"language.rotary_sections": ((),)}
# What CLIPVisionModel and SiglipVisionModel are.
_PLAIN_VISION = {
    "vision.normalization": ("LayerNorm",),
    "vision.qkv_bias": (True,),
    "vision.qk_norm": (False,),
}
# What their text encoders are.
_PLAIN_TEXT = {
    "language.qkv_bias": (True,),
    "language.qk_norm": (False,),
    "language.scaled_embedding": (False,),
}
_OF_ANSWERS = {"objective": ("next_token", "preference")}
_ANSWERS = _OF_ANSWERS | _PLAIN
_PAIRS = {"objective": ("contrastive",)} | _PLAIN
_INTERNVL = _ANSWERS | {
    "vision.family": ("internvit",),
    "vision.activation": ("gelu",),
    "connector.kind": ("mlp",),
    "connector.norm": (True,),
    "connector.bias": (True,),
    "image_tokens": ("internvl",),
}
# Such a class computes logits itself, from a language model without its head.
_NO_HEAD = {"language.final_softcap": (0,)}
_LLAVA = _ANSWERS | {
    "vision.family": ("clip", "siglip"),
    "connector.kind": ("mlp", "linear"),
    "image_tokens": ("llava",),
    **_NO_HEAD,
    **_PLAIN_VISION,
}


def _of_qwen3_vl_moe(arch: Architecture) -> Iterator[str]:
    yield from _of_qwen_vl(arch)
    width = arch.language.hidden_size
    size = arch.language.expert_ffn_hidden_size
    if width in (size, 2 * size):  # releases of transformers turn them around, or do not
        yield (
            "experts whose matrices are no squares; this model has"
            f" --architecture.language.expert_ffn_hidden_size {size} and hidden_size {width}"
        )


_QWEN_VL = {
    **_OF_ANSWERS,
    **_USUAL,
    **_NO_HEAD,
    "vision.unused_layers": (0,),
    "vision.layernorm_epsilon": (1e-6,),  # stands in the code of the class
    "vision.qkv_bias": (True,),
    "vision.qk_norm": (False,),
    "connector.kind": ("merger",),
    "image_tokens": ("qwen2_vl",),
    "language.family": ("qwen2",),
    "language.rotary_interleaved": (False,),
    "language.rotary_dynamic_factor": (1.0,),
}
_QWEN3_VL = _QWEN_VL | {
    "vision.family": ("qwen3_vl",),
    "vision.normalization": ("LayerNorm",),
    "vision.activation": ("quick_gelu", "gelu", "gelu_tanh"),
    "vision.tokens_per_second": (0,),
    "language.rotary_interleaved": (True,),
}
_BLIP2 = {
    "vision.family": ("eva",),
    "vision.normalization": ("LayerNorm",),
    "vision.activation": ("gelu",),
    "vision.qk_norm": (False,),
    "connector.kind": ("qformer",),
}

HOLDS: dict[str, Holds] = {
    "native": Holds(
        name="InternVLForConditionalGeneration", fields=_INTERNVL | _NO_HEAD, beyond=_no_opt
    ),
    "chat": Holds(
        name="InternVLChatModel",
        fields=_INTERNVL
        | {
            "vision.resample": ("bicubic",),
            # Those that its code knows; a Mistral is written as a Llama.
            "language.family": (
                *("qwen2", "qwen3", "qwen3_moe", "internlm2", "internlm3"),
                *("llama", "mistral", "phi3", "gpt_oss"),
            ),
        },
    ),
    "llava": Holds(name="LlavaForConditionalGeneration", fields=_LLAVA, beyond=_of_llava),
    "llava_next": Holds(
        name="LlavaNextForConditionalGeneration",
        fields=_LLAVA | {"connector.newline": (True,)},
        beyond=_of_llava,
    ),
    "llava_onevision": Holds(
        name="LlavaOnevisionForConditionalGeneration",
        fields=_LLAVA | {"connector.newline": (True,)},
        beyond=_of_llava,
    ),
    "paligemma": Holds(
        name="PaliGemmaForConditionalGeneration",
        fields=_ANSWERS
        | {
            "prefix_lm": (True,),
            "image_tokens": ("paligemma",),
            "vision.family": ("siglip",),
            "vision.final_norm": (True,),
            "vision.unused_layers": (0,),
            "vision.unused_head": (False,),
            "connector.kind": ("linear",),
            "connector.bias": (True,),
            "language.family": PALIGEMMA_FAMILIES,
            **_PLAIN_VISION,
        },
    ),
    "fuyu": Holds(
        name="FuyuForCausalLM",
        fields=_ANSWERS
        | {
            "image_tokens": ("fuyu",),
            "vision.num_layers": (0,),
            "connector.kind": ("linear",),
            "connector.bias": (True,),
            "language.family": ("persimmon",),
            "language.tied_head": (False,),
        },
        beyond=_one_patch,
    ),
    "qwen2_vl": Holds(
        name="Qwen2VLForConditionalGeneration",
        fields=_QWEN_VL
        | {
            "vision.family": ("qwen2_vl",),
            "vision.normalization": ("LayerNorm",),
            "vision.activation": ("quick_gelu", "gelu", "gelu_tanh"),
            "vision.window_size": (0,),
            "vision.tokens_per_second": (0,),
        },
        beyond=_of_qwen2_vl,
    ),
    "qwen2_5_vl": Holds(
        name="Qwen2_5_VLForConditionalGeneration",
        fields=_QWEN_VL
        | {
            "vision.family": ("qwen2_5_vl",),
            "vision.normalization": ("RMSNorm",),
            "vision.activation": ("swiglu",),
        },
        beyond=_of_qwen2_5_vl,
    ),
    "qwen3_vl": Holds(
        name="Qwen3VLForConditionalGeneration",
        fields=_QWEN3_VL | {"language.family": ("qwen3",)},
        beyond=_of_qwen_vl,
    ),
    "qwen3_vl_moe": Holds(
        name="Qwen3VLMoeForConditionalGeneration",
        fields=_QWEN3_VL | {"language.family": ("qwen3_moe",), "language.norm_topk_prob": (True,)},
        beyond=_of_qwen3_vl_moe,
    ),
    "clip": Holds(
        name="CLIPModel",
        fields=_PAIRS
        | {
            "vision.family": ("clip",),
            "language.family": ("clip_text",),
            **_PLAIN_VISION,
            **_PLAIN_TEXT,
            "connector.kind": ("class_token",),
            "contrastive.loss": ("softmax",),
            "contrastive.text_bias": (False,),
        },
    ),
    "siglip": Holds(
        name="SiglipModel",
        fields=_PAIRS
        | {
            "vision.family": ("siglip",),
            "language.family": ("siglip_text",),
            **_PLAIN_VISION,
            **_PLAIN_TEXT,
            "connector.kind": ("attention",),
            "contrastive.loss": ("sigmoid",),
            "contrastive.text_bias": (True,),
        },
    ),
    "internvl_c": Holds(
        name="InternVL_C",
        fields=_PAIRS
        | {
            "vision.family": ("internvit",),
            "vision.activation": ("gelu",),
            "connector.kind": ("mean_query",),
            "contrastive.loss": ("softmax",),
            "contrastive.text_bias": (False,),
        },
        beyond=_no_text_encoder,
    ),
    "blip2": Holds(
        name="Blip2ForConditionalGeneration",
        fields=_ANSWERS | _BLIP2 | {"connector.qformer.text": (False,), "image_tokens": ("llava",)},
    ),
    "blip2_retrieval": Holds(
        name="Blip2ForImageTextRetrieval", fields={"objective": ("qformer",)} | _BLIP2
    ),
    "instructblip": Holds(
        name="InstructBlipForConditionalGeneration",
        fields=_ANSWERS | _BLIP2 | {"connector.qformer.text": (True,), "image_tokens": ("llava",)},
        beyond=_instructions,
    ),
    "idefics": Holds(
        name="IdeficsForVisionText2Text",
        fields={
            "objective": ("next_token",),
            "connector.newline": (False,),
            "prefix_lm": (False,),
            "vision.final_norm": (False,),
            "language.rotary_sections": ((),),
            "vision.family": ("clip",),
            "vision.unused_layers": (0,),
            "connector.kind": ("resampler",),
            # OpenFlamingo's are the same and one that stands in no image.
            "image_tokens": ("idefics", "openflamingo"),
            "language.family": ("llama",),
            "language.tied_head": (False,),
            **_PLAIN_VISION,
        },
        beyond=_of_idefics,
    ),
}
"""Yields, for each format, why it cannot hold a model."""
