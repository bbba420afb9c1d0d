"""Small random PaliGemma models, as transformers saves them, with shapes unlike each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PaliGemmaForConditionalGeneration

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import paligemma_config
from tests.convert.models import GEMMA, GEMMA2, ids_with, save_with_pixels, scattered

SMALL = Architecture(
    vision=Vision(
        family="siglip",
        image_size=16,
        patch_size=4,
        num_layers=2,
        final_norm=True,
        hidden_size=36,
        ffn_hidden_size=40,
        num_attention_heads=3,
        activation="gelu_tanh",
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    ),
    connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
    language=Language(
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=1,
        kv_channels=10,
        vocab_size=641,
        rotary_base=1e4,
        max_position_embeddings=512,
        tied_head=True,
        **GEMMA,
    ),
    image_tokens="paligemma",
    prefix_lm=True,
)
KINDS = {
    "tied": SMALL,
    "untied": replace(
        SMALL,
        language=replace(
            SMALL.language, tied_head=False, num_query_groups=2, kv_channels=0, vocab_size=647
        ),
    ),
}
PALIGEMMA2 = replace(SMALL, language=replace(SMALL.language, **GEMMA2, num_query_groups=2))
# A tied head repeats the last token.
UNTIED2 = replace(PALIGEMMA2, language=replace(PALIGEMMA2.language, tied_head=False))
KINDS["PaliGemma 2"] = PALIGEMMA2


def make_paligemma(
    folder: Path,
    architecture: Architecture = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 7,
    spread: float = 0.1,
) -> Path:
    """Write a random model whose every weight differs from its fresh value."""
    settings = paligemma_config.write(architecture, ids_with(image_token_id), dtype)
    model = scattered(PaliGemmaForConditionalGeneration, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)
