"""Small random models in Hugging Face's format, with shapes unlike each other, so that a mix-up
shows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel

from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import native_config, tokenizer_files
from megavlm.convert.hf.token_ids import TokenIds

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"
CONTEXT = 5
"""Id of the placeholder token in that tokenizer."""

SMALL = Architecture(
    vision=Vision(
        image_size=28,
        patch_size=7,
        num_layers=2,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=3,
    ),
    language=Language(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=461,
        rotary_base=12345.0,
        layernorm_epsilon=1e-5,
        max_position_embeddings=512,
    ),
)


def language(**settings) -> Architecture:
    """Return the small model with another language model."""
    return replace(SMALL, language=replace(SMALL.language, **settings))


EXPERTS = dict(
    family="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    num_experts=5,
    experts_per_token=3,
    expert_ffn_hidden_size=20,  # transformers' kernel takes multiples of 4
)
# A window shorter than most samples; YaRN's ramp inside the few rotations of a head.
GPT_OSS = dict(
    family="gpt_oss",
    linear_bias=True,
    attention_sinks=True,
    window_size=5,
    window_attn_skip_freq=2,
    activation="clamped_quick_geglu",
    num_experts=5,
    experts_per_token=3,
    ffn_hidden_size=20,
    expert_ffn_hidden_size=20,
    rotary_yarn_factor=4.0,
    rotary_yarn_positions=64,
    rotary_yarn_truncate=False,
)
SHARED_EXPERT = EXPERTS | dict(
    family="qwen2_moe",
    qkv_bias=True,
    qk_norm=False,
    norm_topk_prob=False,
    shared_expert_ffn_hidden_size=28,
    shared_expert_gate=True,
)
SIGMOID_ROUTER = EXPERTS | dict(
    family="dots1",
    router_scores="sigmoid",
    router_bias=True,
    routed_scaling=2.5,
    shared_expert_ffn_hidden_size=40,
)
# One of each kind that the tables know: vision encoders, families, tied and untied heads.
KINDS = {
    "qwen2": SMALL,
    "qwen2 tied": language(tied_head=True),
    "InternViT-6B": replace(
        SMALL,
        vision=replace(
            SMALL.vision,
            normalization="RMSNorm",
            qkv_bias=False,
            qk_norm=True,
            num_attention_heads=2,
        ),
    ),
    "qwen3": language(family="qwen3", qkv_bias=False, qk_norm=True, kv_channels=10),
    "qwen3 tied": language(
        family="qwen3", qkv_bias=False, qk_norm=True, tied_head=True, num_query_groups=3
    ),
    "qwen3_moe": language(**EXPERTS, kv_channels=10),
    "qwen3_moe tied": language(**EXPERTS | dict(norm_topk_prob=False), tied_head=True),
    "llama": language(family="llama", qkv_bias=False, rotary_dynamic_factor=2.0),
    "mistral": language(family="mistral", qkv_bias=False, kv_channels=6),
    "internlm2": language(family="internlm2", qkv_bias=False, rotary_dynamic_factor=3.0),
    "internlm3": language(family="internlm3", qkv_bias=False, kv_channels=12),
    "phi3": language(family="phi3", qkv_bias=False),
    "gpt_oss": language(**GPT_OSS, kv_channels=10),
}


GEMMA = dict(
    family="gemma",
    qkv_bias=False,
    activation="geglu_tanh",
    zero_centered_norm=True,
    scaled_embedding=True,
)
# A window shorter than most samples, caps that most numbers feel, and products divided by another
# number than the width of a head.
GEMMA2 = GEMMA | dict(
    family="gemma2",
    window_size=5,
    window_attn_skip_freq=2,
    attention_softcap=0.75,
    final_softcap=1.5,
    query_pre_attn_scalar=3,
    sandwich_norm=True,
)
# As classes have it that compute logits themselves.
BARE_GEMMA2 = GEMMA2 | dict(final_softcap=0.0)
PERSIMMON = dict(family="persimmon", qk_norm=True, activation="relu2", rotary_percent=0.5)
# What InternVLChatModel has no place for, too.
NATIVE_KINDS = KINDS | {
    "qwen2_moe": language(**SHARED_EXPERT),
    "dots1": language(**SIGMOID_ROUTER),
    "gemma": language(**GEMMA),
    "gemma2": language(**BARE_GEMMA2),
    "gemma2 tied": language(
        **BARE_GEMMA2 | dict(attention_softcap=0.0), tied_head=True, kv_channels=10
    ),
    "persimmon": language(**PERSIMMON, num_query_groups=6),
    "gemma tied": language(**GEMMA, tied_head=True, kv_channels=10, num_query_groups=1),
}


def as_native(architecture: Architecture) -> Architecture:
    """Return the model as the native dialect describes it, which knows neither InternLM2 nor
    InternLM3.
    """
    family = {"internlm2": "llama", "internlm3": "llama"}.get(
        architecture.language.family, architecture.language.family
    )
    return replace(architecture, language=replace(architecture.language, family=family))


def make_hf(
    folder: Path,
    architecture: Architecture = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "5GB",
) -> Path:
    """Write a random model, as transformers saves it, with the golden tokenizer."""
    settings = native_config.write(
        architecture, TokenIds(image=CONTEXT, begin=0, end=1, pad=2), dtype
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(InternVLConfig.from_dict(settings)).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *router_biases(model)):
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name in tokenizer_files.FILES:
        if (TOKENIZER / name).is_file():
            (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def router_biases(model: PreTrainedModel) -> list[Tensor]:
    """Return the biases of a model's routers, which are no parameters."""
    return [
        tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")
    ]


def ids_with(image: int) -> TokenIds:
    """Return the ids that the config.json of a random model names."""
    return TokenIds(image=image, begin=1, end=2, pad=0)


def scattered(
    kind: type[PreTrainedModel], settings: dict[str, Any], dtype: torch.dtype, spread: float
) -> PreTrainedModel:
    """Return a random model, of what its config.json states, whose every weight differs from its
    fresh value.
    """
    torch.manual_seed(3)
    # Through JSON, as a file would give it.
    config = kind.config_class.from_dict(json.loads(json.dumps(settings)))
    model = kind(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def save_with_pixels(model: PreTrainedModel, folder: Path, architecture: Architecture) -> Path:
    """Save a model and what its pixels are."""
    model.save_pretrained(folder)
    vision = architecture.vision
    pixels = {"image_mean": list(vision.pixel_mean), "image_std": list(vision.pixel_std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def load_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, under the name in its file."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
