"""A model of sizes that every kernel takes, and runs of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavlm.config.connectors import Connector
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
# Tiles of two by two patches in windows of two by two tiles, in all layers but the second.
_WINDOWED = dataclasses.replace(
    SMALL,
    vision=dataclasses.replace(
        SMALL.vision,
        family="qwen2_5_vl",
        image_size=16,
        temporal_patch_size=2,
        normalization="RMSNorm",
        activation="swiglu",
        window_size=32,
        full_attention_layers=(1,),
    ),
    connector=Connector(kind="merger"),
    language=dataclasses.replace(SMALL.language, rotary_sections=(8, 12, 12)),
)
_DEEP = dataclasses.replace(
    _WINDOWED,
    vision=dataclasses.replace(
        _WINDOWED.vision,
        family="qwen3_vl",
        normalization="LayerNorm",
        activation="gelu_tanh",
        window_size=0,
        full_attention_layers=(),
        position_side=6,
        deepstack_layers=(0, 2),
    ),
    language=dataclasses.replace(
        _WINDOWED.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        rotary_sections=(12, 10, 10),
        rotary_interleaved=True,
    ),
)
NATIVE = {"Qwen2.5-VL": _WINDOWED, "Qwen3-VL": _DEEP}
"""Models that read images of any size."""
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
