"""Small random BLIP-2 models, as transformers saves them, with shapes unlike each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

from megavlm.config.connectors import Connector
from megavlm.config.image_text import ImageText
from megavlm.config.qformer import QFormer
from megavlm.config.schema import NO_LANGUAGE, Architecture, Language, Vision
from megavlm.convert.hf import blip2_config, instructblip
from tests.convert.models import ids_with, save_with_pixels, scattered

OPT = Architecture(
    vision=Vision(
        family="eva",
        image_size=15,
        patch_size=5,
        num_layers=2,
        hidden_size=36,
        ffn_hidden_size=44,
        num_attention_heads=3,
        pixel_mean=(0.48, 0.46, 0.41),
        pixel_std=(0.27, 0.26, 0.28),
    ),
    connector=Connector(
        kind="qformer",
        qformer=QFormer(
            queries=5,
            num_layers=3,
            hidden_size=42,
            ffn_hidden_size=52,
            num_attention_heads=7,
            vocab_size=61,
            max_position_embeddings=23,
        ),
    ),
    language=Language(
        family="opt",
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=6,
        vocab_size=641,
        layernorm_epsilon=1e-5,
        max_position_embeddings=300,
        activation="relu",
        tied_head=True,
    ),
    image_tokens="llava",
)
# The first stage: a Q-Former that reads texts, without a language model.
STAGE1 = replace(
    OPT,
    objective="qformer",
    language=NO_LANGUAGE,
    connector=replace(OPT.connector, qformer=replace(OPT.connector.qformer, text=True)),
    image_tokens="internvl",
    image_text=ImageText(size=11, text_tokens=16),
)
_LLAMA = Language(
    family="llama",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=60,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=643,
    rotary_base=1e4,
    max_position_embeddings=512,
    qkv_bias=False,
)
KINDS = {
    "opt": OPT,
    "opt with a head of its own, cross-attention everywhere": replace(
        OPT,
        language=replace(OPT.language, tied_head=False, num_layers=3),
        connector=replace(
            OPT.connector, qformer=replace(OPT.connector.qformer, cross_attention_frequency=1)
        ),
    ),
    "llama": replace(OPT, language=_LLAMA),
    "qwen2 tied": replace(
        OPT, language=replace(_LLAMA, family="qwen2", qkv_bias=True, tied_head=True)
    ),
}


def reading(architecture: Architecture, tokens: int) -> Architecture:
    """Return a model whose Q-Former reads instructions of up to so many tokens."""
    qformer = replace(architecture.connector.qformer, text=True, instruction_tokens=tokens)
    return replace(architecture, connector=replace(architecture.connector, qformer=qformer))


# As many tokens as the Q-Former has positions, which imports take.
INSTRUCT_KINDS = {name: reading(KINDS[name], 23) for name in ("llama", "opt", "qwen2 tied")}
INSTRUCT = INSTRUCT_KINDS["llama"]


def make_instructblip(
    folder: Path,
    architecture: Architecture = INSTRUCT,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 631,
    spread: float = 0.2,
) -> Path:
    """Write a random InstructBLIP, as ``make_blip2`` does."""
    settings = instructblip.config(architecture, ids_with(image_token_id), dtype)
    model = scattered(InstructBlipForConditionalGeneration, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)


def make_blip2(
    folder: Path,
    architecture: Architecture = OPT,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 631,
    spread: float = 0.2,
) -> Path:
    """Write a random model whose every weight differs from its fresh value."""
    settings = blip2_config.write(architecture, ids_with(image_token_id), dtype)
    model = scattered(Blip2ForConditionalGeneration, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)
