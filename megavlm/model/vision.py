"""InternViT: tiles to features, one piece of it for each pipeline chunk.

Shape letters: I tiles, S pixels along a tile, P patches of a tile, D hidden size, L layers.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

from megavlm.config.schema import Vision
from megavlm.model.recompute import ask_for_gradient
from megavlm.model.specs import Kernels, vision_spec
from megavlm.model.vision_layer import drop_path_rate
from megavlm.parallel.layout import Chunk


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Interpolate learned positions to another number of patches, as InternViT does (bicubic, in float32).

    Args:
        positions: [1, 1 + patches, D], the class token's first.
        grid: patches along a side that are wanted.

    Returns:
        [1, 1 + grid * grid, D]
    """
    native = int((positions.shape[1] - 1) ** 0.5)
    if grid == native:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)
    resized = interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def _standardise(tiles: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return ((tiles.float() / 255 - mean.float()) / std.float()).to(dtype)


class VisionEncoder(MegatronModule):
    """The layers of InternViT that stand in one chunk, with the patch embedding in the first.

    Args:
        config: megatron-core's configuration of the whole encoder.
        vision: ours.
        chunk: which layers are built.
        drop_path: highest rate of drop path.
        chosen: kernels of the layers.
        groups: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: Vision,
        chunk: Chunk,
        drop_path: float,
        chosen: Kernels,
        groups: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.vision, self.has_patch_embedding = vision, chunk.has_patch_embedding
        if self.has_patch_embedding:
            width, dtype = vision.hidden_size, config.params_dtype
            self.patch_embedding = nn.Conv2d(3, width, vision.patch_size, vision.patch_size, dtype=dtype)
            self.class_token = nn.Parameter(torch.zeros(1, 1, width, dtype=dtype))
            self.position_embedding = nn.Parameter(torch.zeros(1, vision.tokens, width, dtype=dtype))
            self.register_buffer("mean", torch.tensor(vision.pixel_mean)[:, None, None], persistent=False)
            self.register_buffer("std", torch.tensor(vision.pixel_std)[:, None, None], persistent=False)
            self.standardise = chosen.pointwise(_standardise)
        self.encoder = TransformerBlock(
            config=config,
            spec=vision_spec(len(chunk.vision_layers), vision, chosen),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
            pg_collection=groups,
        )
        rates = [drop_path_rate(drop_path, layer, vision.num_layers) for layer in range(vision.num_layers)]
        rates = torch.tensor(rates).repeat_interleave(2)[:, None] if drop_path else None
        self.register_buffer("drop_path_rates", rates, persistent=False)

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> [I, 3, S, S] in the model's number format, as the encoder was pretrained with."""
        return self.standardise(tiles, self.mean, self.std, self.class_token.dtype)

    def embed(self, tiles: Tensor) -> Tensor:
        """Turn patches into tokens.

        Args:
            tiles: uint8 [I, 3, S, S]

        Returns:
            [1 + P, I, D], the class token first.
        """
        size = self.vision.patch_size
        patches = self.patch_embedding(self.normalise(tiles)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tiles), -1, -1), patches], dim=1)
        return (tokens + resize_positions(self.position_embedding, tiles.shape[-1] // size)).transpose(0, 1).contiguous()

    def kept_paths(self, draws: Tensor) -> Tensor | None:
        """Factors of the residual branches: 0 where drop path drops one, else the inverse of the share that is kept.

        Args:
            draws: uniform numbers in [0, 1), [2L, I], drawn for the pack, so that they depend on no rank.

        Returns:
            [2L, I], or none when nothing is dropped.
        """
        if self.drop_path_rates is None or not self.training:
            return None
        return (draws >= self.drop_path_rates) / (1 - self.drop_path_rates)

    def forward(self, hidden: Tensor | None, tiles: Tensor, draws: Tensor) -> Tensor:
        """Run this chunk's layers.

        Args:
            hidden: output of the chunk before [1 + P, I, D]; none in the first chunk.
            tiles: uint8 [I, 3, S, S], looked at in the first chunk only.
            draws: see ``kept_paths``.

        Returns:
            [1 + P, I, D]
        """
        hidden = self.embed(tiles) if self.has_patch_embedding else hidden
        if not len(self.encoder.layers):
            return hidden
        hidden = ask_for_gradient(hidden, self.config)
        return self.encoder(hidden, attention_mask=None, context=self.kept_paths(draws))
