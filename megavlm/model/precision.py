"""Number formats of weights, activations, matrix products and of what travels between pipeline
chunks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from math import gcd
from typing import Any

import torch

from megavlm.config.checks.device import DeviceCapabilities
from megavlm.config.fp8 import FP8_ROWS
from megavlm.config.schema import Config

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Transformer Engine's attention plans its kernels anew for every number of tiles: fewer numbers,
# fewer plans. More would waste more.
_TILES = 4


def dtype_of(config: Config) -> torch.dtype:
    """Return the dtype of weights and activations; gradients are summed and master weights kept in
    float32 either way.
    """
    return _FORMATS[config.training.precision]


@functools.cache
def device_capabilities() -> DeviceCapabilities:
    """Find out what this device can run."""
    has_cuda = torch.cuda.is_available()
    return DeviceCapabilities(
        capability=torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0)))
        if has_cuda
        else None,
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )


def uses_transformer_engine(config: Config) -> bool:
    """Whether the layers are Transformer Engine's: asked for, or possible in 16 bits where nothing
    is asked for.

    In 32 bits its attention has no fused kernel, and makes a matrix of all pairs of a pack's
    tokens.
    """
    asked = config.training.kernels
    return asked == "transformer_engine" or (
        asked == "auto"
        and config.training.precision == "bfloat16"
        and device_capabilities().runs_transformer_engine
    )


def tile_multiple(config: Config) -> int:
    """Return the number that the tiles on a rank are padded to a multiple of, with padding tiles.

    A tile has an odd number of tokens, so that matrices have rows in the multiple that FP8 asks for
    only if the tiles come in it; or four, which then need a quarter of it.
    """
    recipe = config.fp8.vision
    vision = config.architecture.vision
    if recipe != "none":
        rows = FP8_ROWS[recipe]
        return rows // gcd(rows, vision.tokens) if vision.spans_tiles else rows
    # Shares of a pack's tiles come in few numbers as it is.
    return max(1, _TILES // config.parallel.tile_ranks) if uses_transformer_engine(config) else 1


def fp8_settings(config: Config, part: str) -> dict[str, Any]:
    """Return megatron-core's FP8 settings for a part; empty if the part has no recipe."""
    recipe = config.fp8.recipes.get(part)
    if recipe is None:
        return {}
    first = config.fp8.first_bf16_layers
    last = config.fp8.last_bf16_layers
    # With the history that Transformer Engine itself takes, one large value does not fade after a
    # single step.
    history = (
        {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        if recipe == "delayed"
        else {}
    )
    return dict(
        fp8=config.fp8.format,
        fp8_recipe=recipe,
        first_last_layers_bf16=first + last > 0,
        num_layers_at_start_in_bf16=first,
        num_layers_at_end_in_bf16=last,
        **history,
    )
