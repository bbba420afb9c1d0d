"""Small random IDEFICS models, with shapes unlike each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import IdeficsForVisionText2Text

from megavlm.config.connectors import Connector
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.resampler import Resampler
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.hf import idefics_config
from tests.convert.models import ids_with, save_with_pixels, scattered

FLAMINGO = Architecture(
    vision=Vision(
        family="clip",
        image_size=15,
        patch_size=5,
        num_layers=2,
        hidden_size=36,
        ffn_hidden_size=44,
        num_attention_heads=3,
        layernorm_epsilon=1e-5,
        pixel_mean=(0.48, 0.46, 0.41),
        pixel_std=(0.27, 0.26, 0.28),
    ),
    connector=Connector(
        kind="resampler",
        resampler=Resampler(latents=5, num_layers=2, num_attention_heads=3, head_size=10),
    ),
    language=Language(
        family="llama",
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=60,
        num_attention_heads=6,
        num_query_groups=6,
        vocab_size=643,
        rotary_base=1e4,
        max_position_embeddings=512,
        qkv_bias=False,
    ),
    cross_attention=CrossAttention(every=2),
    added_tokens=2,
    image_tokens="idefics",
)
KINDS = {
    "every second layer": FLAMINGO,
    "before every layer, vector gates, no norms of queries and keys": replace(
        FLAMINGO,
        cross_attention=CrossAttention(every=1, gate="vector", qk_norm=False),
        connector=replace(
            FLAMINGO.connector, resampler=replace(FLAMINGO.connector.resampler, qk_norm=False)
        ),
        added_tokens=3,
    ),
}


def make_idefics(
    folder: Path,
    architecture: Architecture = FLAMINGO,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 0.2,
) -> Path:
    """Write a random model whose every weight differs from its fresh value, gates too."""
    settings = idefics_config.write(architecture, ids_with(0), dtype)
    model = scattered(IdeficsForVisionText2Text, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)
