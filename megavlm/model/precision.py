"""Number formats of weights, activations and of what travels between pipeline chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megavlm.config.schema import Config

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number format of a run; gradients are summed and main weights kept in float32 either way.

    Args:
        dtype: format of weights and activations.
    """

    dtype: torch.dtype

    @property
    def is_half(self) -> bool:
        """Whether float32 main weights are kept beside the model's."""
        return self.dtype == torch.bfloat16


def precision(config: Config) -> Precision:
    """Number format that the configuration asks for."""
    return Precision(dtype=_FORMATS[config.training.precision])
