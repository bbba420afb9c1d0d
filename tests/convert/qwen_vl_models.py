"""Small random Qwen2-VL and Qwen2.5-VL models, as transformers saves them, with shapes unlike each
other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import qwen_vl_config
from megavlm.convert.hf.qwen_vl_config import QWEN2_5_VL, QWEN2_VL, Kind
from tests.convert.models import ids_with, save_with_pixels, scattered

_PIXELS = dict(pixel_mean=PIXELS["clip"][0], pixel_std=PIXELS["clip"][1])
# Tiles of two by two patches, windows of two by two tiles, in all layers but one.
SMALL = Architecture(
    vision=Vision(
        family="qwen2_5_vl",
        image_size=8,
        patch_size=4,
        temporal_patch_size=2,
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=20,
        num_attention_heads=3,
        normalization="RMSNorm",
        activation="swiglu",
        window_size=16,
        full_attention_layers=(1,),
        **_PIXELS,
    ),
    connector=Connector(kind="merger"),
    language=Language(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=461,
        rotary_base=12345.0,
        rotary_sections=(1, 1, 2),
        layernorm_epsilon=1e-5,
        max_position_embeddings=512,
    ),
    image_tokens="qwen2_vl",
)
SMALL_2 = replace(
    SMALL,
    vision=Vision(
        family="qwen2_vl",
        image_size=8,
        patch_size=4,
        temporal_patch_size=2,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=96,
        num_attention_heads=2,
        activation="quick_gelu",
        **_PIXELS,
    ),
    language=replace(SMALL.language, rotary_sections=(2, 1, 1)),
)


def _tied(architecture: Architecture) -> Architecture:
    return replace(architecture, language=replace(architecture.language, tied_head=True))


# Three patches a side, one frame; the patches, tiles and windows of the published models.
KINDS: dict[str, Architecture] = {
    "2.5": SMALL,
    "2.5 tied, tiles of 28 pixels": replace(
        _tied(SMALL),
        vision=replace(
            SMALL.vision,
            image_size=28,
            patch_size=14,
            window_size=112,
            full_attention_layers=(0, 2),
        ),
    ),
    "2.5, tiles of nine patches": replace(
        SMALL, vision=replace(SMALL.vision, image_size=12, window_size=30, temporal_patch_size=1)
    ),
    "2": SMALL_2,
    "2 tied": replace(_tied(SMALL_2), vision=replace(SMALL_2.vision, activation="gelu_tanh")),
}
MARKS = {"video_token_id": 632, "vision_start_token_id": 633, "vision_end_token_id": 634}


def kind_of(architecture: Architecture) -> Kind:
    """Return the class that holds a model."""
    return qwen_vl_config.KINDS[architecture.vision.family]


def make_qwen_vl(
    folder: Path,
    architecture: Architecture,
    dtype: torch.dtype = torch.bfloat16,
    image_token_id: int = 7,
    spread: float = 0.1,
) -> Path:
    """Write a random model whose every weight differs from its fresh value."""
    kind = kind_of(architecture)
    settings = qwen_vl_config.write(kind, architecture, MARKS, ids_with(image_token_id), dtype)
    form: Any = getattr(transformers, kind.class_name)
    model = scattered(form, settings, dtype, spread)
    return save_with_pixels(model, folder, architecture)


make_qwen2_vl = partial(make_qwen_vl, architecture=SMALL_2)
make_qwen2_5_vl = partial(make_qwen_vl, architecture=SMALL)
FORMS = {QWEN2_VL.model_type: make_qwen2_vl, QWEN2_5_VL.model_type: make_qwen2_5_vl}
