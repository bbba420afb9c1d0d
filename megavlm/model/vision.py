"""The vision encoder: tiles to features, one piece of it for each pipeline chunk.

Shape letters: I tiles, S pixels along a tile, N tokens of a tile (its patches and, where there is
one, the class token), D hidden size, L layers.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from megavlm.config.schema import Vision
from megavlm.model.kernels import Kernels
from megavlm.model.positions import resize_positions
from megavlm.model.recompute import ask_for_gradient
from megavlm.model.specs import vision_spec
from megavlm.model.standardise import standardise
from megavlm.model.vision_layer import drop_path_rate
from megavlm.planner.layout import Chunk


def flat_patches(pixels: Tensor, size: int) -> Tensor:
    """Cut tiles [I, 3, S, S] into patches of ``size`` pixels a side, row by row: [I, patches, 3 *
    size * size].
    """
    squares = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product: cuDNN takes a slow kernel
    for three channels. It is a module of its own, since megatron-core's ``DistributedDataParallel``
    waits for the updated weights of a module in a hook before its forward pass.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, 3, S, S] -> [I, patches, D]; pixels behind the last whole patch are left out."""
        size = self.kernel_size[0]
        whole = pixels.shape[-1] // size * size  # SigLIP's 384 pixels are 27 patches of 14, and 6
        pixels = pixels[..., :whole, :whole]
        return linear(flat_patches(pixels, size), self.weight.flatten(1), self.bias)


class VisionEncoder(MegatronModule):
    """The layers of the encoder that stand in one chunk, with the patch embedding in the first.

    Args:
        config: megatron-core's configuration of the whole encoder.
        vision: ours.
        chunk: which layers are built.
        drop_path: highest rate of drop path.
        kernels: of the layers.
        groups: process groups.
        vp_stage: index of the model chunk on its rank; none if the rank has one.
    """

    drop_path_share = 1.0  # of the highest rates, in the step at hand

    def __init__(
        self,
        config: TransformerConfig,
        vision: Vision,
        chunk: Chunk,
        drop_path: float,
        kernels: Kernels,
        groups: ProcessGroupCollection,
        vp_stage: int | None,
    ):
        super().__init__(config)
        self.vision = vision
        self.has_patch_embedding = chunk.has_patch_embedding
        if self.has_patch_embedding:
            width = vision.hidden_size
            dtype = config.params_dtype
            size = vision.patch_size
            self.patch_embedding = PatchEmbedding(
                3, width, size, size, bias=vision.has_patch_bias, dtype=dtype
            )
            self.class_token = (
                nn.Parameter(torch.zeros(1, 1, width, dtype=dtype))
                if vision.has_class_token
                else None
            )
            self.position_embedding = nn.Parameter(
                torch.zeros(1, vision.tokens, width, dtype=dtype)
            )
            self.register_buffer(
                "mean", torch.tensor(vision.pixel_mean)[:, None, None], persistent=False
            )
            self.register_buffer(
                "std", torch.tensor(vision.pixel_std)[:, None, None], persistent=False
            )
            self.embedding_norm = None
            if vision.has_embedding_norm:
                self.embedding_norm = kernels.norm(
                    config=config, hidden_size=width, eps=vision.layernorm_epsilon
                )
            self.standardise = kernels.pointwise(standardise)
        self.final_norm = None
        if vision.final_norm and vision.num_layers - 1 in chunk.vision_layers:
            self.final_norm = kernels.norm(
                config=config, hidden_size=vision.hidden_size, eps=vision.layernorm_epsilon
            )
        self.encoder = TransformerBlock(
            config=config,
            spec=vision_spec(chunk.vision_layers, vision, kernels),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        rates = [
            drop_path_rate(drop_path, layer, vision.num_layers)
            for layer in range(vision.num_layers)
        ]
        rates = torch.tensor(rates).repeat_interleave(2)[:, None] if drop_path else None
        self.register_buffer("drop_path_rates", rates, persistent=False)

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> [I, 3, S, S] in the model's dtype, as the encoder was
        pretrained with.
        """
        return self.standardise(tiles, self.mean, self.std, self.position_embedding.dtype)

    def embed(self, tiles: Tensor, kept: Tensor | None = None) -> Tensor:
        """Turn patches into tokens.

        Args:
            tiles: uint8 [I, 3, S, S]
            kept: int64 [K, I], the patches of each tile that become tokens; none: all.

        Returns:
            [N, I, D], the class token first.
        """
        size = self.vision.patch_size
        tokens = self.patch_embedding(self.normalise(tiles))
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tiles), -1, -1), tokens], dim=1)
        positions = resize_positions(
            self.position_embedding, tiles.shape[-1] // size, int(self.vision.has_class_token)
        )
        embedded = (tokens + positions).transpose(0, 1).contiguous()
        if kept is not None:
            embedded = _kept_tokens(embedded, kept, int(self.vision.has_class_token))
        return embedded if self.embedding_norm is None else self.embedding_norm(embedded)

    def kept_paths(self, draws: Tensor) -> Tensor | None:
        """Factors of the residual branches: 0 where drop path drops one, else the inverse of the
        share that is kept.

        Args:
            draws: uniform numbers in [0, 1), [2L, I], drawn for the pack, so that they depend on no
                rank.

        Returns:
            [2L, I], or none when nothing is dropped.
        """
        if self.drop_path_rates is None or not self.training:
            return None
        rates = self.drop_path_rates
        if self.drop_path_share != 1.0:
            rates = rates * self.drop_path_share
        return (draws >= rates) / (1 - rates)

    def forward(
        self, hidden: Tensor | None, tiles: Tensor, draws: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Run this chunk's layers.

        Args:
            hidden: output of the chunk before [N, I, D]; none in the first chunk.
            tiles: uint8 [I, 3, S, S], looked at in the first chunk only.
            draws: see ``kept_paths``.
            kept: see ``embed``; looked at in the first chunk only.

        Returns:
            [N, I, D]
        """
        hidden = self.embed(tiles, kept) if self.has_patch_embedding else hidden
        if not len(self.encoder.layers):
            return hidden
        hidden = ask_for_gradient(hidden, self.config)
        hidden = self.encoder(hidden, attention_mask=None, context=self.kept_paths(draws))
        return hidden if self.final_norm is None else self.final_norm(hidden)


def _kept_tokens(tokens: Tensor, kept: Tensor, classes: int) -> Tensor:
    """Return the class token and the kept patches of each tile; ``kept`` as for ``embed``."""
    rows = (kept + classes)[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:classes], tokens.gather(0, rows)])
