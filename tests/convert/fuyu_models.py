"""Small random Fuyu models, as transformers saves them, with shapes unlike each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import FuyuForCausalLM

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import fuyu_config
from tests.convert.models import PERSIMMON, ids_with, save_with_pixels, scattered

SMALL = Architecture(
    vision=Vision(
        num_layers=0,
        image_size=6,
        patch_size=6,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    ),
    connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
    language=Language(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=6,
        vocab_size=461,
        rotary_base=12345.0,
        layernorm_epsilon=1e-5,
        max_position_embeddings=512,
        **PERSIMMON,
    ),
    image_tokens="fuyu",
)
# Three heads do not divide over two ranks, and 463 rows not over two, either.
KINDS = {
    "six heads": SMALL,
    "ten heads": replace(
        SMALL,
        vision=replace(SMALL.vision, image_size=5, patch_size=5),
        language=replace(
            SMALL.language,
            hidden_size=40,
            num_attention_heads=10,
            num_query_groups=10,
            vocab_size=463,
        ),
    ),
}


def make_fuyu(
    folder: Path,
    architecture: Architecture = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 7,
    spread: float = 0.1,
) -> Path:
    """Write a random model whose every weight differs from its fresh value."""
    settings = fuyu_config.write(architecture, ids_with(image_token_id), dtype)
    model = scattered(FuyuForCausalLM, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)
