"""A vision encoder that reads images of any size, one piece of it for each pipeline chunk: that of
Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631).

Shape letters: I tiles, S pixels along a tile, N patches of a tile, D hidden size, K outputs of
layers that become features.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from megavlm.config.schema import Vision
from megavlm.data.loading.batch import Images
from megavlm.model.kernels import Kernels
from megavlm.model.native_attention import PackedImages
from megavlm.model.positions import positions_of_patches
from megavlm.model.recompute import ask_for_gradient
from megavlm.model.rotary import patch_angles
from megavlm.model.specs import vision_spec
from megavlm.model.standardise import standardise
from megavlm.model.vision import flat_patches
from megavlm.planner.layout import Chunk


class FramePatchEmbedding(nn.Conv3d):
    """A convolution over frames, rows and columns whose patches do not overlap, as one matrix
    product. A module of its own for the reason that ``PatchEmbedding`` tells.
    """

    def forward(
        self, pixels: Tensor, pairs: Tensor | None = None, seconds: Tensor | None = None
    ) -> Tensor:
        """Turn patches into tokens.

        Args:
            pixels: of tiles [I, 3, S, S].
            pairs: int64 [V], tiles that show two frames of a video, of which ``pixels`` has the
                first; none: every frame that a tile shows is the same image.
            seconds: pixels of the second one [V, 3, S, S].

        Returns:
            [I * N, D]
        """
        size = self.kernel_size[-1]
        flat = flat_patches(pixels, size)
        tokens = linear(flat, self.weight.sum(2).flatten(1), self.bias)
        if pairs is not None:
            frames = torch.cat([flat[pairs], flat_patches(seconds, size)], dim=-1)
            by_frame = self.weight.transpose(1, 2).flatten(1)
            tokens = tokens.index_copy(0, pairs, linear(frames, by_frame, self.bias))
        return tokens.flatten(0, 1)


class NativeVisionEncoder(MegatronModule):
    """The layers of the encoder that stand in one chunk, with the patch embedding in the first.

    Args:
        config: megatron-core's configuration of the whole encoder.
        vision: ours.
        chunk: which layers are built.
        kernels: of the layers.
        groups: process groups.
        vp_stage: index of the model chunk on its rank; none if the rank has one.
    """

    drop_path_share = 1.0  # there is nothing to drop

    def __init__(
        self,
        config: TransformerConfig,
        vision: Vision,
        chunk: Chunk,
        kernels: Kernels,
        groups: ProcessGroupCollection,
        vp_stage: int | None,
    ):
        super().__init__(config)
        self.vision = vision
        self.has_patch_embedding = chunk.has_patch_embedding
        if self.has_patch_embedding:
            size = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
            self.patch_embedding = FramePatchEmbedding(
                3,
                vision.hidden_size,
                size,
                size,
                bias=vision.has_patch_bias,
                dtype=config.params_dtype,
            )
            self.position_embedding = None
            if vision.has_learned_positions:
                table = (1, vision.position_rows, vision.hidden_size)
                self.position_embedding = nn.Parameter(
                    torch.zeros(table, dtype=config.params_dtype)
                )
            for name, values in (("mean", vision.pixel_mean), ("std", vision.pixel_std)):
                self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
            self.standardise = kernels.pointwise(standardise)
        self.encoder = TransformerBlock(
            config=config,
            spec=vision_spec(chunk.vision_layers, vision, kernels),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> [I, 3, S, S] in the model's dtype, as the encoder was
        pretrained with.
        """
        return self.standardise(tiles, self.mean, self.std, self.patch_embedding.weight.dtype)

    def embed(self, tiles: Tensor, images: Images) -> Tensor:
        """Turn patches into tokens; arguments as of ``forward`` -> [I * N, 1, D]."""
        seconds = None if images.pairs is None else self.normalise(images.second_frames)
        tokens = self.patch_embedding(self.normalise(tiles), images.pairs, seconds)
        if self.position_embedding is not None:
            tokens = tokens + positions_of_patches(
                self.position_embedding, images.places, images.sizes
            )
        return tokens[:, None]

    def forward(self, hidden: Tensor | None, tiles: Tensor, images: Images) -> Tensor:
        """Run this chunk's layers.

        Args:
            hidden: output of the chunk before [K * I * N, 1, D]; none in the first chunk.
            tiles: uint8 [I, 3, S, S], looked at in the first chunk only.
            images: where they stand.

        Returns:
            [K * I * N, 1, D], tile by tile: the output of the last layer, then those of the layers
                for DeepStack so far.
        """
        if self.has_patch_embedding:
            hidden = self.embed(tiles, images)
        if not len(self.encoder.layers):
            return hidden
        hidden = ask_for_gradient(hidden, self.config)
        patches = images.places.shape[1]
        deep = hidden[patches:] if self.vision.deepstack_layers else None
        return self.encoder(
            hidden[:patches],
            attention_mask=None,
            context=deep,
            rotary_pos_emb=patch_angles(images.places, self.vision.head_size),
            packed_seq_params=PackedImages.of_images(images),
        )
