"""The recipe of Qwen3-VL (arXiv 2511.21631): a vision encoder that reads images of any size, with
features of three of its layers beside the last one's (DeepStack), connectors that merge squares of
four patches, a Qwen3 whose tokens know frames, rows and columns.

Published are what each stage of pre-training trains, on how many tokens and in packs of which
length (table 1 and section 3.1): 0, the mergers on 67 billion tokens; 1, everything on about 1
trillion, both in packs of 8,192; 2, everything on about 1 trillion in packs of 32,768; 3,
everything on 100 billion in packs of 262,144. Then come 1.2 million conversations, once in packs of
32,768 and once of up to 262,144 tokens (sections 4.1 and 4.2.1; sft is the first of the two). The
loss of a token weighs by the square root of its sample's length (section 1). Steps follow from
that; learning rates and batch sizes are not published, and ours, and so is that sft trains
everything: the report does not say what it trains. Distillation and reinforcement learning, which
follow there, are not here. Videos are not read.

finetune has the values of the authors' code for models that they have tuned already, see
``qwen2_5_vl``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megavlm.config.connectors import Connector
from megavlm.config.recipes import qwen2_5_vl
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS

# Qwen3-VL-8B.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="qwen3_vl",
        image_size=32,
        patch_size=16,
        temporal_patch_size=2,
        num_layers=27,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_attention_heads=16,
        activation="gelu_tanh",
        position_side=48,
        deepstack_layers=(8, 16, 24),
        pixel_mean=PIXELS["siglip"][0],
        pixel_std=PIXELS["siglip"][1],
    ),
    connector=Connector(kind="merger"),
    language=Language(
        family="qwen3",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=151936,
        rotary_base=5e6,
        rotary_sections=(24, 20, 20),
        rotary_interleaved=True,
        layernorm_epsilon=1e-6,
        max_position_embeddings=262144,
        qkv_bias=False,
        qk_norm=True,
    ),
    image_tokens="qwen2_vl",
)
# The two smallest have a smaller vision encoder.
_SMALLER = replace(
    ARCHITECTURE,
    vision=replace(
        ARCHITECTURE.vision,
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=4096,
        deepstack_layers=(5, 11, 17),
    ),
)


def _experts(*sizes: int, expert_ffn_hidden_size: int) -> Architecture:
    """Return a model with 128 experts, of which each token takes 8. The third size has no
    effect.
    """
    facts: dict[str, Any] = dict(
        family="qwen3_moe",
        kv_channels=128,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=expert_ffn_hidden_size,
    )
    return qwen2_5_vl.sized(ARCHITECTURE, *sizes, **facts)


_SIZED = qwen2_5_vl.sized
MODELS: dict[str, Architecture] = {
    "qwen3-vl-2b": _SIZED(_SMALLER, 28, 2048, 6144, 16, 8, tied_head=True),
    "qwen3-vl-4b": _SIZED(_SMALLER, 36, 2560, 9728, 32, 8, kv_channels=128, tied_head=True),
    "qwen3-vl-8b": ARCHITECTURE,
    "qwen3-vl-32b": _SIZED(ARCHITECTURE, 64, 5120, 25600, 64, 8, kv_channels=128),
    "qwen3-vl-30b-a3b": _experts(48, 2048, 6144, 32, 4, expert_ffn_hidden_size=768),
    "qwen3-vl-235b-a22b": _experts(94, 4096, 12288, 64, 4, expert_ffn_hidden_size=1536),
}

_EVERYTHING = ("vision", "connector", "language")


def _stage(
    like: Stage, description: str, *, lr: float, capacity: int = 8192, **training: Any
) -> Stage:
    """Return a stage with another learning rate, packs of another length and other settings of
    training, in which tokens weigh by the square root of their sample's length.
    """
    return replace(
        like,
        description=description,
        loss_reduction="square",
        capacity=capacity,
        optimizer=replace(like.optimizer, lr=lr),
        training=replace(like.training, **training),
    )


# Batches of pre-training are of 4 million tokens.
STAGES: dict[str, Stage] = {
    "0": _stage(
        qwen2_5_vl.PRETRAIN,
        "connector: captions, knowledge and texts in images",
        lr=2e-4,
        trainable=("connector",),
        steps=16_000,
    ),
    "1": _stage(
        qwen2_5_vl.PRETRAIN,
        "all parts: images among texts, questions, texts alone",
        lr=5e-5,
        steps=238_000,
    ),
    "2": _stage(
        qwen2_5_vl.PRETRAIN,
        "all parts: more texts and instructions, in packs of 32,768 tokens",
        lr=2e-5,
        capacity=32_768,
        steps=238_000,
        global_batch_size=128,
    ),
    "3": _stage(
        qwen2_5_vl.PRETRAIN,
        "all parts: long documents, in packs of 262,144 tokens",
        lr=1e-5,
        capacity=262_144,
        steps=23_800,
        global_batch_size=16,
    ),
    "sft": _stage(
        qwen2_5_vl.INSTRUCT,
        "all parts: instruction tuning, in packs of 32,768 tokens",
        lr=1e-5,
        capacity=32_768,
        trainable=_EVERYTHING,
    ),
    "finetune": qwen2_5_vl.FINETUNE,
}

RECIPE = Recipe(
    name="qwen3_vl",
    description="Qwen3-VL: vision encoder with DeepStack, mergers, Qwen3; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("qwen3_vl",),
    tiling="native",
    hub_format="qwen3_vl",
    other_formats={"qwen3_moe": "qwen3_vl_moe"},
)
