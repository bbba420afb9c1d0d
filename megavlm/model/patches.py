"""What stands in the place of a vision encoder that a model does not have: tiles to patches of
pixels.

Shape letters: I tiles, S pixels along a tile, P pixels along a patch, N patches of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megavlm.config.schema import Vision
from megavlm.model.kernels import Kernels
from megavlm.model.standardise import standardise


class Patches(nn.Module):
    """Cuts tiles into patches, whose pixels the connector reads; it has no parameters.

    Args:
        vision: the settings of the model's images.
        kernels: of the layers.
        dtype: of the result.
    """

    drop_path_share = 1.0  # there is nothing to drop

    def __init__(self, vision: Vision, kernels: Kernels, dtype: torch.dtype):
        super().__init__()
        self.patch_size = vision.patch_size
        self.dtype = dtype
        for name, values in (("mean", vision.pixel_mean), ("std", vision.pixel_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.standardise = kernels.pointwise(standardise)

    def normalise(self, tiles: Tensor) -> Tensor:
        """Cut tiles into patches.

        Args:
            tiles: uint8 [I, 3, S, S]

        Returns:
            [I, N, 3 P^2], row by row; inside a patch pixels row by row, red, green and blue of each
            beside each other.
        """
        size = self.patch_size
        pixels = self.standardise(tiles, self.mean, self.std, self.dtype)
        squares = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(
        self, hidden: None, tiles: Tensor, draws: Tensor | None, kept: Tensor | None = None
    ) -> Tensor:
        """Return patches [N, I, 3 P^2]; arguments as of ``VisionEncoder``, of which only tiles
        matter.
        """
        return self.normalise(tiles).transpose(0, 1)
