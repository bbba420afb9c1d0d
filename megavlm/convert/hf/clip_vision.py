"""The settings of vision encoders of CLIP's and SigLIP's kind, alone or in a larger model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megavlm.config.schema import Vision
from megavlm.convert.hf.json_files import SIZES, missing, name_of, needed_sizes, no_positive_numbers

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What transformers calls the activations of CLIP and SigLIP, and what we call them."""
_SIZES = ("image_size", "patch_size", *SIZES, "vocab_size", "max_position_embeddings")


def problems(found: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield what our model does not support of an encoder of images or texts."""
    stated = [name for name in _SIZES if name in found]  # images have no words, texts no patches
    yield from needed_sizes(section, found, *stated)
    yield from missing(section, found, "layer_norm_eps")
    yield from no_positive_numbers(section, found, "layer_norm_eps")
    if found.get("hidden_act") not in ACTIVATIONS:
        name = f"{section}.hidden_act".lstrip(".")
        yield f"{name} is {found.get('hidden_act')!r}, must be one of {', '.join(ACTIVATIONS)}"


def activation_name(activation: str) -> str:
    """Return what transformers calls one of our activations."""
    return name_of(activation, ACTIVATIONS)


def read(
    found: Mapping[str, Any],
    *,
    family: str,
    pixels: dict[str, Any],
    unused_layers: int = 0,
    unused_head: bool = False,
    final_norm: bool = False,
) -> Vision:
    """Read a vision encoder.

    Args:
        found: its settings, complete.
        family: ours.
        pixels: as of ``json_files.pixel_fields``.
        unused_layers: last ones, of which features need none.
        unused_head: whether its files have a head, which features do not need.
        final_norm: whether features come from behind the norm at its end.
    """
    return Vision(
        family=family,
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        num_layers=found["num_hidden_layers"] - unused_layers,
        unused_layers=unused_layers,
        unused_head=unused_head,
        final_norm=final_norm,
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        layernorm_epsilon=found["layer_norm_eps"],
        activation=ACTIVATIONS[found["hidden_act"]],
        **pixels,
    )


def write(vision: Vision) -> dict[str, Any]:
    """Return the settings of a vision encoder, in transformers' words."""
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_hidden_layers": vision.num_layers + vision.unused_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "layer_norm_eps": vision.layernorm_epsilon,
        "hidden_act": activation_name(vision.activation),
    }
