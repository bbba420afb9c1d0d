"""A model of sizes that every kernel takes, and runs of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavlm.config.schema import Architecture, Config, Language, Vision
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


def small(dataset: Path, **settings: Any) -> Config:
    """Configure a run of the small model in bfloat16; ``settings`` as in ``config_for``."""
    defaults = dict(precision="bfloat16", lr=1e-3, steps=10)
    return dataclasses.replace(config_for(dataset, **defaults | settings), architecture=SMALL)
