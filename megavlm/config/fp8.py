"""Settings of FP8 matrix products, and the sizes of matrices that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Matrices come in multiples of so many rows and columns (Transformer Engine 2.11).
FP8_ROWS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def fp8_multiple(recipe: str, is_gathered: bool) -> int:
    """Return the number that an FP8 recipe needs the rows and columns of matrices to be a multiple
    of; 1 without a recipe.

    Args:
        recipe: one of ``Fp8``'s.
        is_gathered: whether ranks gather them in 8 bits (sequence parallelism): blocks of 128 may
            then not be cut short.
    """
    return 128 if recipe == "blockwise" and is_gathered else FP8_ROWS.get(recipe, 1)


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """FP8 matrix products, by Transformer Engine; weights, gradients and everything else keep their
    dtypes.

    A recipe sets the scaling: by the largest value of earlier steps (delayed), of the tensor itself
    (tensorwise), of blocks of 128 x 128 weights and 1 x 128 activations (blockwise), or of 32
    elements in hardware (mxfp8, from Blackwell on).

    Args:
        vision: recipe of the vision encoder's layers.
        language: recipe of the language model's layers; embedding, head and connector stay in 16
            bits.
        format: e4m3 everywhere, or e5m2 for gradients (hybrid).
        first_bf16_layers: layers at the start of each part that stay in 16 bits.
        last_bf16_layers: layers at the end of each part that stay in 16 bits.
    """

    vision: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    language: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    first_bf16_layers: int = 0
    last_bf16_layers: int = 0

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe of each part that has one."""
        return {
            part: recipe
            for part, recipe in (("vision", self.vision), ("language", self.language))
            if recipe != "none"
        }
