"""The recipe of InternVL-C, the first stage of InternVL (Chen et al., arXiv 2312.14238): an
InternViT-6B from scratch and a LLaMA-7B as text encoder, contrasted on pairs.

The code of this training was never published; the model's was, for inference, and that of a
fine-tuning for retrieval. The paper gives 28.7 billion pairs in batches of 164 thousand, 196 pixels
with half of the patches dropped, and 224 pixels with all of them for the last half billion.
Learning rates, warm-up, weight decay, second moment and drop path are those of its appendix. What
is not published: whether the rate goes on falling in that last part (here it does, along the
parabola that a cosine ends in), and whether the scale has a bound (here it has none).

Stage 3 has the values of the fine-tuning code: layer-wise decay, rate 1e-6, 364 pixels, pairs of
one image as positives of each other. Its model also had InternVL-G's queries; here it is the part
of its loss that contrasts image encoder and texts.

A batch is counted in packs: packs of 256 pairs (``--tile_cap 256``) make 640 of them one step.
"""

from __future__ import annotations

from megavlm.config.architecture import Architecture, Contrastive, Language, Vision
from megavlm.config.connectors import Connector
from megavlm.config.recipes.clip import EVERYTHING
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Optimizer, Training

_STEPS = 172_119
_LAST_STEPS = 3_052


STAGES: dict[str, Stage] = {
    "1": Stage(
        description="both encoders, at 196 pixels with half of the patches",
        loss_reduction="sample",
        objective="contrastive",
        image_size=196,
        patch_drop=0.5,
        optimizer=Optimizer(
            lr=1e-3,
            lr_multipliers=("language=0.1",),
            warmup_steps=5000,
            warmup_ratio=0.0,
            decay_steps=_STEPS + _LAST_STEPS,
            weight_decay=0.1,
            decay="matrices",
            adam_beta2=0.95,
        ),
        training=Training(trainable=EVERYTHING, steps=_STEPS, global_batch_size=640, drop_path=0.2),
    ),
    "2": Stage(
        description="both encoders, at 224 pixels with all patches: the end of stage 1",
        loss_reduction="sample",
        objective="contrastive",
        image_size=224,
        optimizer=Optimizer(
            lr=8e-7,  # where the cosine of stage 1 is
            lr_multipliers=("language=0.1",),
            warmup_ratio=0.0,
            schedule="polynomial",
            power=2.0,
            weight_decay=0.1,
            decay="matrices",
            adam_beta2=0.95,
        ),
        training=Training(
            trainable=EVERYTHING, steps=_LAST_STEPS, global_batch_size=640, drop_path=0.2
        ),
    ),
    "3": Stage(
        description="both encoders, at 364 pixels: fine-tuning for retrieval",
        loss_reduction="sample",
        objective="contrastive",
        image_size=364,
        positives="image",
        optimizer=Optimizer(
            lr=1e-6,
            warmup_steps=100,
            warmup_ratio=0.0,
            weight_decay=0.05,
            decay="matrices",
            vision_layer_decay=0.9,
            language_layer_decay=0.9,
        ),
        # Five epochs of COCO's 567 thousand captions, 1,024 pairs a step in packs of 32.
        training=Training(trainable=EVERYTHING, steps=2_767, global_batch_size=32, drop_path=0.3),
    ),
}

RECIPE = Recipe(
    name="internvl_c",
    description="InternVL-C: InternViT and a language model as text encoder, InfoNCE over pairs",
    stages=STAGES,
    architecture=Architecture(
        objective="contrastive",
        vision=Vision(
            image_size=196,
            num_layers=48,
            hidden_size=3200,
            ffn_hidden_size=12800,
            num_attention_heads=25,
            normalization="RMSNorm",
            qkv_bias=False,
            qk_norm=True,
        ),
        connector=Connector(kind="mean_query"),
        # LLaMA's own; InternVL's had Chinese tokens too, which --init.language brings along.
        language=Language(
            family="llama",
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=11008,
            num_attention_heads=32,
            num_query_groups=32,
            vocab_size=32000,
            rotary_base=1e4,
            max_position_embeddings=2048,
            qkv_bias=False,
        ),
        contrastive=Contrastive(size=768, max_scale=0.0),
        image_tokens="none",
    ),
    template=("internvl_c",),
    tiling="any",
    hub_format="internvl_c",
)
