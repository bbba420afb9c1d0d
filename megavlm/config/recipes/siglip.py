"""The recipe of SigLIP (Zhai et al., arXiv 2303.15343): an image encoder and a text encoder from
scratch, on pairs of an image and its text, each pair judged by itself.

The model is its B/16 at 224 pixels. Learning rate, weight decay and second moment are the paper's;
a batch is 32,768 pairs (packs of 256 pairs make 128 of them one step). The length of training is 9
billion pairs, one of the paper's.
"""

from __future__ import annotations

from megavlm.config.architecture import Architecture, Contrastive, Language, Vision
from megavlm.config.connectors import Connector
from megavlm.config.recipes.clip import EVERYTHING
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Optimizer, Training
from megavlm.config.vision import PIXELS

STAGES: dict[str, Stage] = {
    "1": Stage(
        description="image encoder and text encoder, pairs told apart over the global batch",
        loss_reduction="sample",
        objective="contrastive",
        optimizer=Optimizer(
            lr=1e-3,
            warmup_steps=20_000,
            warmup_ratio=0.0,
            weight_decay=1e-4,
            decay="matrices",
            adam_beta2=0.95,
        ),
        training=Training(trainable=EVERYTHING, steps=274_658, global_batch_size=128),
    ),
}

RECIPE = Recipe(
    name="siglip",
    description="SigLIP: image encoder and text encoder, sigmoid loss over pairs",
    stages=STAGES,
    architecture=Architecture(
        objective="contrastive",
        vision=Vision(
            family="siglip",
            image_size=224,
            patch_size=16,
            num_layers=12,
            hidden_size=768,
            ffn_hidden_size=3072,
            num_attention_heads=12,
            activation="gelu_tanh",
            pixel_mean=PIXELS["siglip"][0],
            pixel_std=PIXELS["siglip"][1],
        ),
        connector=Connector(kind="attention"),
        language=Language(
            family="siglip_text",
            num_layers=12,
            hidden_size=768,
            ffn_hidden_size=3072,
            num_attention_heads=12,
            num_query_groups=12,
            vocab_size=32000,
            max_position_embeddings=64,
            activation="gelu_tanh",
        ),
        contrastive=Contrastive(size=768, loss="sigmoid", text_bias=True, max_scale=0.0),
    ),
    template=("siglip",),
    tiling="any",
    hub_format="siglip",
)
