"""A model of sizes that every kernel takes, and runs of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavlm.config.schema import Architecture, Config, Language, Vision
from tests.convert.models import EXPERTS, GEMMA2, GPT_OSS
from tests.ranks.runs import config_for

CAPACITY = 1024

# Heads of 64, as in every InternVL; widths that FP8 allows in blocks of 128; an odd number of
# tokens a tile.
SMALL = Architecture(
    vision=Vision(
        image_size=64,
        patch_size=8,
        num_layers=3,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
    ),
    language=Language(
        num_layers=3,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=1009,
        rotary_base=1e4,
        max_position_embeddings=4096,
    ),
)
_WIDE = dict(ffn_hidden_size=768, expert_ffn_hidden_size=256)
LANGUAGES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "experts": EXPERTS | _WIDE,
    "GPT-OSS": GPT_OSS | _WIDE | dict(window_size=64),
    "Gemma 2": GEMMA2 | dict(window_size=64, query_pre_attn_scalar=64),
}
"""Kinds of language models: what is other than in ``SMALL``."""


def small(dataset: Path, kind: str = "Qwen2", **settings: Any) -> Config:
    """Configure a run of the small model in bfloat16, with one of ``LANGUAGES``; ``settings`` as in
    ``config_for``.
    """
    defaults = dict(precision="bfloat16", lr=1e-3, steps=10)
    changed = dataclasses.replace(SMALL.language, **LANGUAGES[kind])
    model = dataclasses.replace(SMALL, language=changed)
    return dataclasses.replace(config_for(dataset, **defaults | settings), architecture=model)
