"""The recipe of Qwen2.5-VL (arXiv 2502.13923): a vision encoder that reads images of any size and
sees windows of them in most layers, a connector that merges squares of four patches, a Qwen2.5
whose tokens know frames, rows and columns.

Published are what each stage trains, on how many tokens and in packs of which length (table 2 and
sections 2.2.2 and 2.3.4): 1, the vision encoder on 1.5 trillion tokens; 2, everything on 2
trillion, both in packs of 8,192; 3, everything on 0.6 trillion in packs of 32,768; then instruction
tuning on 2 million conversations (sft) and DPO, each pair once, both with the vision encoder
frozen. Steps follow from that; learning rates and batch sizes are not published, and ours. Where
the report says vision encoder, the connector learns too in pre-training: a new one could give the
language model nothing.

finetune has the values of the authors' code for models that they have tuned already
(``qwen-vl-finetune/scripts/sft_7b.sh`` of QwenLM/Qwen3-VL): 2e-7, 4 x 4 samples of each of 8 GPUs,
and samples of up to 8,192 tokens; how long, the data says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megavlm.config.connectors import Connector
from megavlm.config.preference import Preference
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Architecture, Language, Optimizer, Training, Vision
from megavlm.config.vision import PIXELS

# Qwen2.5-VL-7B.
ARCHITECTURE = Architecture(
    vision=Vision(
        family="qwen2_5_vl",
        image_size=28,
        patch_size=14,
        temporal_patch_size=2,
        tokens_per_second=2,
        num_layers=32,
        hidden_size=1280,
        ffn_hidden_size=3420,
        num_attention_heads=16,
        normalization="RMSNorm",
        activation="swiglu",
        window_size=112,
        full_attention_layers=(7, 15, 23, 31),
        pixel_mean=PIXELS["clip"][0],
        pixel_std=PIXELS["clip"][1],
    ),
    connector=Connector(kind="merger"),
    language=Language(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        rotary_base=1e6,
        rotary_sections=(16, 24, 24),
        layernorm_epsilon=1e-6,
        max_position_embeddings=128000,
    ),
    image_tokens="qwen2_vl",
)


def sized(
    model: Architecture, layers: int, width: int, inner: int, heads: int, groups: int, **facts: Any
) -> Architecture:
    """Return a model with a language model of other sizes: layers, hidden size, hidden size of the
    MLP, query heads, query groups.
    """
    sizes = dict(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
    return replace(model, language=replace(model.language, **sizes, **facts))


# The two largest have a wider MLP in the vision encoder.
_WIDER = replace(ARCHITECTURE, vision=replace(ARCHITECTURE.vision, ffn_hidden_size=3456))
MODELS: dict[str, Architecture] = {
    "qwen2_5-vl-3b": sized(ARCHITECTURE, 36, 2048, 11008, 16, 2, vocab_size=151936, tied_head=True),
    "qwen2_5-vl-7b": ARCHITECTURE,
    "qwen2_5-vl-32b": sized(_WIDER, 64, 5120, 27648, 40, 8),
    "qwen2_5-vl-72b": sized(_WIDER, 80, 8192, 29568, 64, 8),
}

_EVERYTHING = ("vision", "connector", "language")
_TUNED = ("connector", "language")
# Of pre-training, where the report has no values: ours, but for the first learning rate, which is
# that of Qwen-VL's first stage (arXiv 2308.12966). Batches are of 4 million tokens.
_FRESH = Optimizer(lr=2e-4, warmup_steps=2000, warmup_ratio=0.0, weight_decay=0.05)
PRETRAIN_VISION = Stage(
    description="vision encoder and connector: captions, knowledge and texts in images",
    loss_reduction="token",
    capacity=8192,
    optimizer=_FRESH,
    training=Training(trainable=("vision", "connector"), steps=358_000, global_batch_size=512),
)
PRETRAIN = Stage(
    description="all parts: images among texts, questions, texts alone",
    loss_reduction="token",
    capacity=8192,
    optimizer=replace(_FRESH, lr=5e-5),
    training=Training(trainable=_EVERYTHING, steps=477_000, global_batch_size=512),
)
INSTRUCT = Stage(
    description="connector and language model: instruction tuning",
    loss_reduction="token",
    capacity=8192,
    optimizer=Optimizer(lr=1e-5, warmup_ratio=0.03, weight_decay=0.0),
    training=Training(trainable=_TUNED, steps=2000, global_batch_size=128),
)
FINETUNE = replace(
    INSTRUCT,
    description="connector and language model: a published model on data of one's own",
    optimizer=replace(INSTRUCT.optimizer, lr=2e-7),
)

STAGES: dict[str, Stage] = {
    "1": PRETRAIN_VISION,
    "2": PRETRAIN,
    "3": replace(
        PRETRAIN,
        description="all parts: long documents, in packs of 32,768 tokens",
        capacity=32_768,
        optimizer=replace(_FRESH, lr=1e-5),
        training=Training(trainable=_EVERYTHING, steps=143_000, global_batch_size=128),
    ),
    "sft": INSTRUCT,
    "dpo": Stage(
        description="connector and language model: preferred answers against rejected ones",
        loss_reduction="sample",
        objective="preference",
        capacity=8192,
        preference=Preference(dpo=1.0, bco=0.0, sft=0.0),
        optimizer=Optimizer(lr=1e-6, warmup_ratio=0.03, weight_decay=0.0),
        training=Training(trainable=_TUNED, steps=1000, global_batch_size=64),
    ),
    "finetune": FINETUNE,
}

RECIPE = Recipe(
    name="qwen2_5_vl",
    description="Qwen2.5-VL: vision encoder with windows, merger, Qwen2.5; images of any size",
    stages=STAGES,
    architecture=ARCHITECTURE,
    template=("qwen2_vl",),
    tiling="native",
    hub_format="qwen2_5_vl",
)
