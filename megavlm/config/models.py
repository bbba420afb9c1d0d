"""The table of models, which ``--model`` picks from.

They are InternVL 2.5 (arXiv 2412.05271), 3 (arXiv 2504.10479) and 3.5 (arXiv 2508.18265), and
those of recipes: LLaVA-NeXT and LLaVA-OneVision, for ``--recipe llava_next`` and
``llava_onevision``, PaliGemma, Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megavlm.config.recipes import (
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from megavlm.config.schema import NO_LANGUAGE, Architecture, Init, Language, Vision

ReadModel = Callable[[str, Init, Architecture | None], Architecture]
"""Reads what the model in a Hugging Face folder is made of or, if no folder is named, the model
that parts give; the last argument has what no part says.
"""

_NO_PARTS = Init()
# InternViT-300M-448px-V2_5: the schema's defaults are its sizes.
_INTERNVIT_300M = Vision()
# InternViT-6B-448px-V2_5, and V1-5, which the 26B model starts from.
_INTERNVIT_6B = Vision(
    num_layers=45,
    hidden_size=3200,
    ffn_hidden_size=12800,
    num_attention_heads=25,
    normalization="RMSNorm",
    qkv_bias=False,
    qk_norm=True,
)


def _language(
    layers: int, width: int, inner: int, heads: int, groups: int, **facts: Any
) -> Language:
    """Make a language model from its sizes: layers, hidden size, hidden size of the MLP, query
    heads, query groups.
    """
    sizes = dict(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
    return Language(**sizes, **facts)


def _qwen2_5(*sizes: int, epsilon: float = 1e-6) -> Language:
    # Nine special tokens are added to each tokenizer; InternVL cuts the unused rows of Qwen2.5's
    # table off.
    return _language(*sizes, vocab_size=151674, layernorm_epsilon=epsilon)


def _internlm2_5(*sizes: int) -> Language:
    return _language(
        *sizes,
        family="internlm2",
        vocab_size=92553,
        qkv_bias=False,
        layernorm_epsilon=1e-5,
        rotary_dynamic_factor=2.0,
    )


def _qwen3(*sizes: int, kv_channels: int = 0, tied_head: bool = False) -> Language:
    facts = dict(
        family="qwen3",
        vocab_size=151936,
        max_position_embeddings=40960,
        qkv_bias=False,
        qk_norm=True,
    )
    return _language(*sizes, kv_channels=kv_channels, tied_head=tied_head, **facts)


def _qwen3_moe(*sizes: int, expert_ffn_hidden_size: int) -> Language:
    """Make a language model with 128 experts, of which each token takes 8. The third size has no
    effect.
    """
    language = _qwen3(*sizes, kv_channels=128)
    return replace(
        language,
        family="qwen3_moe",
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=expert_ffn_hidden_size,
    )


# GPT-OSS-20B, whose table has rows for InternVL's nine special tokens.
_GPT_OSS_20B = Language(
    family="gpt_oss",
    num_layers=24,
    hidden_size=2880,
    ffn_hidden_size=2880,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=201088,
    rotary_base=150000.0,
    rotary_yarn_factor=32.0,
    rotary_yarn_truncate=False,
    layernorm_epsilon=1e-5,
    max_position_embeddings=131072,
    linear_bias=True,
    attention_sinks=True,
    window_size=128,
    window_attn_skip_freq=2,
    activation="clamped_quick_geglu",
    num_experts=32,
    experts_per_token=4,
    expert_ffn_hidden_size=2880,
)

# Learns to read a few shapes and colours within minutes on a laptop; for trying things out and for
# tests.
_TINY = Architecture(
    vision=Vision(
        image_size=32,
        patch_size=4,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
    ),
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

# What examples/quickstart trains from scratch in minutes: tiles of four patches, each tile one
# feature.
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

_INTERNVL: dict[str, tuple[Vision, Language]] = {
    "internvl2_5-1b": (_INTERNVIT_300M, _qwen2_5(24, 896, 4864, 14, 2)),
    "internvl2_5-2b": (_INTERNVIT_300M, _internlm2_5(24, 2048, 8192, 16, 8)),
    "internvl2_5-4b": (_INTERNVIT_300M, _qwen2_5(36, 2048, 11008, 16, 2)),
    "internvl2_5-8b": (_INTERNVIT_300M, _internlm2_5(32, 4096, 14336, 32, 8)),
    "internvl2_5-26b": (_INTERNVIT_6B, _internlm2_5(48, 6144, 16384, 48, 8)),
    "internvl2_5-38b": (_INTERNVIT_6B, _qwen2_5(64, 5120, 27648, 40, 8)),
    "internvl2_5-78b": (_INTERNVIT_6B, _qwen2_5(80, 8192, 29568, 64, 8)),
    "internvl3-1b": (_INTERNVIT_300M, _qwen2_5(24, 896, 4864, 14, 2)),
    "internvl3-2b": (_INTERNVIT_300M, _qwen2_5(28, 1536, 8960, 12, 2)),
    "internvl3-8b": (_INTERNVIT_300M, _qwen2_5(28, 3584, 18944, 28, 4)),
    "internvl3-14b": (_INTERNVIT_300M, _qwen2_5(48, 5120, 13824, 40, 8, epsilon=1e-5)),
    "internvl3-38b": (_INTERNVIT_6B, _qwen2_5(64, 5120, 27648, 40, 8, epsilon=1e-5)),
    "internvl3-78b": (_INTERNVIT_6B, _qwen2_5(80, 8192, 29568, 64, 8, epsilon=1e-5)),
    "internvl3_5-1b": (
        _INTERNVIT_300M,
        _qwen3(28, 1024, 3072, 16, 8, kv_channels=128, tied_head=True),
    ),
    "internvl3_5-2b": (_INTERNVIT_300M, _qwen3(28, 2048, 6144, 16, 8, tied_head=True)),
    "internvl3_5-4b": (
        _INTERNVIT_300M,
        _qwen3(36, 2560, 9728, 32, 8, kv_channels=128, tied_head=True),
    ),
    "internvl3_5-8b": (_INTERNVIT_300M, _qwen3(36, 4096, 12288, 32, 8)),
    "internvl3_5-14b": (_INTERNVIT_300M, _qwen3(40, 5120, 17408, 40, 8)),
    "internvl3_5-38b": (_INTERNVIT_6B, _qwen3(64, 5120, 25600, 64, 8, kv_channels=128)),
    "internvl3_5-30b-a3b": (
        _INTERNVIT_300M,
        _qwen3_moe(48, 2048, 6144, 32, 4, expert_ffn_hidden_size=768),
    ),
    "internvl3_5-241b-a28b": (
        _INTERNVIT_6B,
        _qwen3_moe(94, 4096, 12288, 64, 4, expert_ffn_hidden_size=1536),
    ),
    "internvl3_5-gpt-oss-20b": (_INTERNVIT_300M, _GPT_OSS_20B),
}

MODELS: dict[str, Architecture] = {
    "tiny": _TINY,
    **{
        name: Architecture(vision=vision, language=language)
        for name, (vision, language) in _INTERNVL.items()
    },
    **llava_next.MODELS,
    **llava_onevision.MODELS,
    "digits": _DIGITS,
    **paligemma.MODELS,
    **qwen2_vl.MODELS,
    **qwen2_5_vl.MODELS,
    **qwen3_vl.MODELS,
}


def for_objective(model: Architecture, objective: str) -> Architecture:
    """Return a model with the objective of a stage, as that trains it; without its language model
    if the objective has none.
    """
    model = replace(model, objective=objective)
    model = model.needs.fit(model)
    return model if model.needs.has_language else replace(model, language=NO_LANGUAGE)


def refuse_doubt(name: str) -> None:
    """Raise ValueError if the name of a model that is known here may mean a Hugging Face folder."""
    if (Path(name) / "config.json").is_file():
        raise ValueError(
            f"--model {name}: megavlm knows a model of that name, and the working folder has one in"
            f" {name}/config.json; for the folder write --model ./{name}, for megavlm's rename it"
        )


def architecture(
    name: str,
    init: Init = _NO_PARTS,
    read_model: ReadModel | None = None,
    default: Architecture | None = None,
) -> Architecture:
    """Find the architecture for ``--model``: a row of the table, the model in a Hugging Face
    folder, or, without a name, the model made of the parts in ``init``, or the recipe's.

    Args:
        name: of the row, or the folder; may be empty if ``init`` names a language model, or if
            there is a default.
        init: the parts to start from.
        read_model: reads what is not in the table; none: only the table is known.
        default: the recipe's model.

    Raises:
        ValueError: there is no such row and no such folder, which the message tells, or both, or
            the folder is of a model that ours is not.
        FileNotFoundError: the folder holds no model.
    """
    if name in MODELS:
        refuse_doubt(name)
        return MODELS[name]
    has_parts = init.language or (init.parts and default is not None)
    if read_model is not None and (Path(name).is_dir() if name else has_parts):
        return read_model(name, init, default)
    if default is not None and not name:
        return default
    close = get_close_matches(name, MODELS, n=1, cutoff=0.8)
    raise ValueError(
        f"--model {name}: no such model, no such folder, and none of that name in the hub's cache;"
        + (f" did you mean {close[0]}?" if close else "")
        + f" known models are {', '.join(MODELS)}"
    )
