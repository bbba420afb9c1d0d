"""Small random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, as files of published ones hold them, with
shapes unlike each other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import qwen_vl_config
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.qwen_vl_kinds import KINDS as CLASSES
from megavlm.convert.hf.qwen_vl_kinds import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE, Kind
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
        tokens_per_second=3,
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
# Positions of three by three patches, features of two layers beside the last, one of which is the
# last.
SMALL_3 = replace(
    SMALL,
    vision=Vision(
        family="qwen3_vl",
        image_size=8,
        patch_size=4,
        temporal_patch_size=2,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=44,
        num_attention_heads=2,
        activation="gelu_tanh",
        position_side=3,
        deepstack_layers=(0, 2),
        pixel_mean=PIXELS["siglip"][0],
        pixel_std=PIXELS["siglip"][1],
    ),
    language=replace(
        SMALL.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        kv_channels=12,
        rotary_sections=(2, 2, 2),
        rotary_interleaved=True,
    ),
)
SMALL_3_MOE = replace(
    SMALL_3,
    language=replace(
        SMALL_3.language,
        family="qwen3_moe",
        num_experts=12,
        experts_per_token=3,
        expert_ffn_hidden_size=20,
    ),
)


def _tied(architecture: Architecture) -> Architecture:
    return replace(architecture, language=replace(architecture.language, tied_head=True))


# Three patches a side; the patches, tiles and windows of the published models.
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
        SMALL, vision=replace(SMALL.vision, image_size=12, window_size=30)
    ),
    "2": SMALL_2,
    "3": SMALL_3,
    "3 tied, tiles of 32 pixels": replace(
        _tied(SMALL_3), vision=replace(SMALL_3.vision, image_size=32, patch_size=16)
    ),
    "3, one merger": replace(SMALL_3, vision=replace(SMALL_3.vision, deepstack_layers=())),
    "3, experts": SMALL_3_MOE,
    "2 tied": replace(_tied(SMALL_2), vision=replace(SMALL_2.vision, activation="gelu_tanh")),
}
MARKS = {"video_token_id": 632, "vision_start_token_id": 633, "vision_end_token_id": 634}


def kind_of(architecture: Architecture) -> Kind:
    """Return the class that holds a model."""
    if architecture.language.num_experts:
        return QWEN3_VL_MOE
    return CLASSES[architecture.vision.family]


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
    save_with_pixels(model, folder, architecture)
    if architecture.language.num_experts:
        turn_experts(folder)
    return folder


def turn_experts(folder: Path) -> None:
    """Turn the experts around: a new model of transformers 5 saves them output first, and files of
    published ones hold them input first.
    """
    path = folder / "model.safetensors"
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(turned, path, {"format": "pt"})


make_qwen2_vl = partial(make_qwen_vl, architecture=SMALL_2)
make_qwen2_5_vl = partial(make_qwen_vl, architecture=SMALL)
make_qwen3_vl = partial(make_qwen_vl, architecture=SMALL_3)
make_qwen3_vl_moe = partial(make_qwen_vl, architecture=SMALL_3_MOE)
FORMS = {
    QWEN2_VL.model_type: make_qwen2_vl,
    QWEN2_5_VL.model_type: make_qwen2_5_vl,
    QWEN3_VL.model_type: make_qwen3_vl,
    QWEN3_VL_MOE.model_type: make_qwen3_vl_moe,
}


def refuse(folder: Path, model: Architecture, section: str, change: dict, told: str) -> None:
    """See that a model with another setting is refused."""
    source = make_qwen_vl(folder, model)
    settings = read_json(source / "config.json")
    settings[section] |= change
    write_json(source / "config.json", settings)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)
