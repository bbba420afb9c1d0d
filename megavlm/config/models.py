"""The table of models, which ``--model`` picks from.

Weights can be converted, both ways, for models whose language part is of the Qwen2.5 family (``internvl2_5-1b`` and ``-4b``), from and to
the native InternVL format of Hugging Face. Those with InternLM2.5 (``-2b`` and ``-8b``) have the same kind of layer, without bias, so
they train and load our own checkpoints; OpenGVLab's and InternLM's own files for them, with their fused names, are not read yet.
"""

from __future__ import annotations

from megavlm.config.schema import Architecture, Language, Vision

# InternViT-300M-448px-V2_5: the schema's defaults are its sizes.
_INTERNVIT_300M = Vision()

# Nine special tokens are added to each tokenizer; InternVL cuts the unused rows of Qwen2.5's table off.
_QWEN2_5_VOCAB_SIZE = 151674
_INTERNLM2_5_VOCAB_SIZE = 92553

_QWEN2_5_0_5B = Language(
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    vocab_size=_QWEN2_5_VOCAB_SIZE,
)
_QWEN2_5_3B = Language(
    num_layers=36,
    hidden_size=2048,
    ffn_hidden_size=11008,
    num_attention_heads=16,
    num_query_groups=2,
    vocab_size=_QWEN2_5_VOCAB_SIZE,
)
# InternLM2.5 stretches its rotary base only beyond 32768 positions, which no sample reaches here.
_INTERNLM2_5_1_8B = Language(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    vocab_size=_INTERNLM2_5_VOCAB_SIZE,
    layernorm_epsilon=1e-5,
    qkv_bias=False,
)
_INTERNLM2_5_7B = Language(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=_INTERNLM2_5_VOCAB_SIZE,
    layernorm_epsilon=1e-5,
    qkv_bias=False,
)

# Learns to read a few shapes and colours within minutes on a laptop; for trying things out and for tests.
_TINY = Architecture(
    vision=Vision(image_size=32, patch_size=4, num_layers=4, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4),
    language=Language(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        rotary_base=1e4,
        max_position_embeddings=2048,
    ),
)

# What examples/quickstart trains from scratch in minutes: tiles of four patches, each tile one feature.
_DIGITS = Architecture(
    vision=Vision(
        image_size=16,
        patch_size=8,
        num_layers=4,
        hidden_size=96,
        ffn_hidden_size=256,
        num_attention_heads=4,
        layer_scale=1.0,  # not deep, and not pretrained: there is nothing to damp
    ),
    language=Language(
        num_layers=3,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        rotary_base=1e4,
        max_position_embeddings=2048,
    ),
)

MODELS: dict[str, Architecture] = {
    "tiny": _TINY,
    "internvl2_5-1b": Architecture(vision=_INTERNVIT_300M, language=_QWEN2_5_0_5B),
    "internvl2_5-2b": Architecture(vision=_INTERNVIT_300M, language=_INTERNLM2_5_1_8B),
    "internvl2_5-4b": Architecture(vision=_INTERNVIT_300M, language=_QWEN2_5_3B),
    "internvl2_5-8b": Architecture(vision=_INTERNVIT_300M, language=_INTERNLM2_5_7B),
    "digits": _DIGITS,
}


def architecture(name: str) -> Architecture:
    """The row ``name`` of the table.

    Raises:
        ValueError: there is no such row; the message lists the names.
    """
    if name not in MODELS:
        raise ValueError(f"--model {name}: no such model; known are {', '.join(MODELS)}")
    return MODELS[name]
