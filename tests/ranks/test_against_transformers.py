"""The model against ``transformers``: the same logits from the same weights, in float32, at several
layouts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Architecture, Config
from tests.convert.chat import make_chat
from tests.convert.models import (
    BARE_GEMMA2,
    EXPERTS,
    GEMMA,
    GPT_OSS,
    PERSIMMON,
    SHARED_EXPERT,
    SIGMOID_ROUTER,
    router_biases,
)
from tests.data.samples import make_dataset
from tests.ranks.layouts import asks_for_all
from tests.ranks.model_checks import answers_of_transformers, assert_equals_transformers
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for


def _model(vision: dict | None = None, **language) -> Architecture:
    found = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **(vision or {})))
    return dataclasses.replace(found, language=dataclasses.replace(TINY.language, **language))


# InternViT-6B's kind: an odd number of heads, and a norm over all of them.
SIX_B = dict(
    normalization="RMSNorm",
    qkv_bias=False,
    qk_norm=True,
    num_attention_heads=3,
    hidden_size=30,
    num_layers=2,
)
MODELS = {
    "qwen2": _model(),
    "qwen2 tied, three vision heads": _model(
        dict(num_attention_heads=3, hidden_size=36), tied_head=True, vocab_size=211
    ),
    "qwen3, InternViT-6B": _model(
        SIX_B,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        kv_channels=10,
        num_query_groups=1,
        vocab_size=256,
    ),
    "qwen3 tied": _model(
        family="qwen3", qkv_bias=False, qk_norm=True, num_query_groups=4, tied_head=True
    ),
    "llama": _model(family="llama", qkv_bias=False, num_query_groups=4, rotary_dynamic_factor=2.0),
    "mistral, InternViT-6B": _model(SIX_B, family="mistral", qkv_bias=False, kv_channels=6),
    "phi3": _model(
        family="phi3", qkv_bias=False, num_attention_heads=6, num_query_groups=2, vocab_size=211
    ),
    "internlm2": _model(family="internlm2", qkv_bias=False, num_attention_heads=6, vocab_size=193),
    "gemma tied": _model(
        **GEMMA, tied_head=True, kv_channels=14, num_query_groups=1, vocab_size=211
    ),
    "gemma2": _model(**BARE_GEMMA2, kv_channels=14, num_query_groups=2, vocab_size=211),
    "persimmon": _model(**PERSIMMON, num_query_groups=4, vocab_size=193),
    "internlm3": _model(family="internlm3", qkv_bias=False, kv_channels=14, num_query_groups=1),
    "qwen3_moe": _model(**EXPERTS, kv_channels=10, num_query_groups=1),
    "dots1": _model(**SIGMOID_ROUTER, num_query_groups=1),
    "qwen2_moe": _model(**SHARED_EXPERT, num_query_groups=2),
    "qwen3_moe tied": _model(
        **EXPERTS | dict(experts_per_token=1, norm_topk_prob=False), tied_head=True, vocab_size=211
    ),
    "gpt_oss": _model(**GPT_OSS, kv_channels=10, num_query_groups=1),
    "gpt_oss tied": _model(
        **GPT_OSS
        | dict(window_size=40, rotary_yarn_factor=1.0, rotary_yarn_truncate=True)
        | dict(rotary_yarn_positions=4096),
        tied_head=True,
        vocab_size=211,
    ),
}
# Whose parts others have, or the models of a recipe.
RARE = ("gemma tied", "gpt_oss tied")
EVERYDAY = [name for name in MODELS if asks_for_all() or name not in RARE]
# Read in the format of OpenGVLab; the others in that of transformers.
CHAT = ("qwen2 tied, three vision heads", "qwen3, InternViT-6B", "internlm2", "internlm3")
CHAT += ("qwen3_moe tied", "gpt_oss")


def random_model(architecture: Architecture, context_token_id: int, folder: Path) -> None:
    """Write a random ``InternVLForConditionalGeneration`` whose every weight differs from its fresh
    value.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from megavlm.convert.hf import native_config
    from megavlm.convert.hf.token_ids import TokenIds

    settings = native_config.write(
        architecture, TokenIds(image=context_token_id, begin=0, end=1, pad=0), torch.float32
    )
    torch.manual_seed(5)
    model = InternVLForConditionalGeneration(
        InternVLConfig.from_dict(json.loads(json.dumps(settings)))
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *router_biases(model)):
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", EVERYDAY)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, name: str
) -> None:
    architecture = MODELS[name]
    vocabulary = architecture.language.vocab_size
    features = architecture.features_per_tile
    make_dataset(
        tmp_path / "packs",
        packs=1,
        vocab_size=vocabulary,
        context_token_id=7,
        tile_size=16,
        features_per_tile=features,
    )
    random_model(architecture, 7, tmp_path / "hf")
    folder = (
        make_chat(tmp_path / "hf", tmp_path / "chat", architecture)
        if name in CHAT
        else tmp_path / "hf"
    )
    expected = answers_of_transformers(tmp_path / "hf", tmp_path / "packs", architecture)

    def configure(**settings) -> Config:
        config = config_for(tmp_path / "packs", **settings)
        return dataclasses.replace(config, architecture=architecture)

    assert_equals_transformers(ranks, configure, folder, expected)
