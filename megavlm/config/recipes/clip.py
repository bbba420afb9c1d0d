"""The recipe of CLIP (Radford et al., arXiv 2103.00020): an image encoder and a text encoder from
scratch, on pairs of an image and its text.

The model and the values are those of its ViT-B/32: batches of 32,768 pairs, 32 epochs of 400
million pairs. A batch is counted in packs: packs of 256 pairs (``--tile_cap 256``) make 128 of them
one step. The text encoder is that of the released weights.
"""

from __future__ import annotations

from megavlm.config.architecture import Architecture, Contrastive, Language, Vision
from megavlm.config.connectors import Connector
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Optimizer, Training
from megavlm.config.vision import PIXELS

EVERYTHING = ("vision", "connector", "language", "objective")
STAGES: dict[str, Stage] = {
    "1": Stage(
        description="image encoder and text encoder, contrasted over the global batch",
        loss_reduction="sample",
        objective="contrastive",
        optimizer=Optimizer(
            lr=5e-4,
            warmup_steps=2000,
            warmup_ratio=0.0,
            weight_decay=0.2,
            decay="matrices",
            adam_beta2=0.98,
            adam_eps=1e-6,
        ),
        training=Training(trainable=EVERYTHING, steps=390_625, global_batch_size=128),
    ),
}

RECIPE = Recipe(
    name="clip",
    description="CLIP: image encoder and text encoder, InfoNCE over pairs",
    stages=STAGES,
    architecture=Architecture(
        objective="contrastive",
        vision=Vision(
            family="clip",
            image_size=224,
            patch_size=32,
            num_layers=12,
            hidden_size=768,
            ffn_hidden_size=3072,
            num_attention_heads=12,
            layernorm_epsilon=1e-5,
            activation="quick_gelu",
            pixel_mean=PIXELS["clip"][0],
            pixel_std=PIXELS["clip"][1],
        ),
        connector=Connector(kind="class_token"),
        language=Language(
            family="clip_text",
            num_layers=12,
            hidden_size=512,
            ffn_hidden_size=2048,
            num_attention_heads=8,
            num_query_groups=8,
            vocab_size=49408,
            max_position_embeddings=77,
            layernorm_epsilon=1e-5,
            activation="quick_gelu",
        ),
        contrastive=Contrastive(size=512),
    ),
    template=("clip",),
    tiling="any",
    hub_format="clip",
)
