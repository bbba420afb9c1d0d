"""Small random LLaVA models, as transformers saves them, with shapes unlike each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from megavlm.config.connectors import LLAVA, Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import llava_config
from tests.convert.models import ids_with, save_with_pixels, scattered

LINEAR = Connector(kind="linear", pixel_shuffle=1, norm=False)
SMALL = Architecture(
    vision=Vision(
        family="clip",
        image_size=16,
        patch_size=4,
        num_layers=2,
        unused_layers=1,
        hidden_size=36,
        ffn_hidden_size=40,
        num_attention_heads=3,
        layernorm_epsilon=1e-5,
        activation="quick_gelu",
        pixel_mean=(0.48, 0.46, 0.41),
        pixel_std=(0.27, 0.26, 0.28),
    ),
    connector=LLAVA,
    language=Language(
        family="llama",
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=641,
        rotary_base=1e4,
        layernorm_epsilon=1e-5,
        max_position_embeddings=512,
        qkv_bias=False,
    ),
    image_tokens="llava",
)


def _with(language: dict, vision: dict | None = None, connector: Connector = LLAVA) -> Architecture:
    return replace(
        SMALL,
        language=replace(SMALL.language, **language),
        vision=replace(SMALL.vision, **(vision or {})),
        connector=connector,
    )


KINDS = {
    "vicuna": SMALL,
    "qwen2 tied, features of the last layer": _with(
        dict(family="qwen2", qkv_bias=True, tied_head=True),
        dict(num_layers=3, unused_layers=0, activation="gelu"),
    ),
    "mistral, linear": _with(dict(family="mistral", kv_channels=10), connector=LINEAR),
    "qwen3, two unused layers": _with(
        dict(family="qwen3", qk_norm=True, num_query_groups=1, vocab_size=647),
        dict(num_layers=2, unused_layers=2, num_attention_heads=4),
    ),
}
_SIGLIP = dict(
    family="siglip",
    image_size=18,  # two pixels more than the patches cover
    layernorm_epsilon=1e-6,
    activation="gelu_tanh",
    pixel_mean=PIXELS["siglip"][0],
    pixel_std=PIXELS["siglip"][1],
)
SIGLIP = {
    "siglip with its head, no biases in the connector": _with(
        dict(family="qwen2", qkv_bias=True),
        _SIGLIP | dict(unused_head=True),
        replace(LLAVA, bias=False),
    ),
    "siglip, features of the last layer": _with(
        {}, _SIGLIP | dict(num_layers=3, unused_layers=0), replace(LINEAR, bias=False)
    ),
}


def make_llava(
    folder: Path,
    architecture: Architecture = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 631,
    spread: float = 0.2,
) -> Path:
    """Write a random model whose every weight differs from its fresh value; the second layer of a
    linear connector stays an identity.
    """
    settings = llava_config.write(architecture, ids_with(image_token_id), dtype)
    model = scattered(LlavaForConditionalGeneration, settings, dtype, spread)
    if architecture.connector.kind == "linear":
        second = model.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        if second.bias is not None:
            torch.nn.init.zeros_(second.bias)
    return save_with_pixels(model, folder, architecture)
