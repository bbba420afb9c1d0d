"""The Perceiver resampler of Flamingo (arXiv 2204.14198), in the form of IDEFICS: learned latents
read a tile and each other.

Its layers are torch's, whole on every tensor-parallel rank; with ``--parallel.vision data`` each
rank runs them on its own tiles.

Shape letters: I tiles, N tokens of a tile in the vision encoder, F latents, D hidden size, H heads.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import relu

from megavlm.config.resampler import Resampler
from megavlm.config.schema import Config
from megavlm.model.connector.heads import attend, split_heads
from megavlm.model.kernels import Kernels
from megavlm.model.transformer import connector_config


class _Layer(nn.Module):
    """Attention of the latents to the tile and to themselves, then an MLP; both add to the latents.

    Args:
        settings: sizes.
        width: of latents and tile.
        dtype: of the parameters.
    """

    def __init__(self, settings: Resampler, width: int, dtype: torch.dtype):
        super().__init__()
        self.heads = settings.num_attention_heads
        size = settings.head_size
        inner = settings.inner_size(width)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=dtype)

        self.tile_norm = nn.LayerNorm(width, dtype=dtype)
        self.latent_norm = nn.LayerNorm(width, dtype=dtype)
        self.query = linear(width, self.heads * size)
        self.key_value = linear(width, 2 * self.heads * size)
        self.query_norm = self.key_norm = None
        if settings.qk_norm:
            self.query_norm = nn.LayerNorm(size, dtype=dtype)
            self.key_norm = nn.LayerNorm(size, dtype=dtype)
        self.proj = linear(self.heads * size, width)
        self.mlp_norm = nn.LayerNorm(width, dtype=dtype)
        self.up = linear(width, inner)
        self.down = linear(inner, width)

    def forward(self, latents: Tensor, tile: Tensor) -> Tensor:
        """Run the layer: latents [I, F, D] and tile [I, N, D] -> [I, F, D]."""
        asking = self.latent_norm(latents)
        seen = torch.cat([self.tile_norm(tile), asking], dim=1)
        parts = (self.query(asking), *self.key_value(seen).chunk(2, dim=-1))
        query, key, value = (split_heads(part, self.heads) for part in parts)
        if self.query_norm is not None:
            query = self.query_norm(query)
            key = self.key_norm(key)
        latents = latents + self.proj(attend(query, key, value))
        return latents + self.down(relu(self.up(self.mlp_norm(latents))))


class ResamplerConnector(MegatronModule):
    """Latents that read each tile, and a norm behind them; in front of a language model without
    cross-attention also a linear layer to its width.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        architecture = config.architecture
        settings = architecture.connector.resampler
        width = architecture.vision.hidden_size
        dtype = self.config.params_dtype
        self.latents = nn.Parameter(torch.zeros(settings.latents, width, dtype=dtype))
        self.layers = nn.ModuleList(
            _Layer(settings, width, dtype) for _ in range(settings.num_layers)
        )
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.output = None
        if not architecture.cross_attention.every:
            self.output = nn.Linear(width, architecture.language.hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states into latents.

        Args:
            hidden: of the vision encoder [N, I, D], a class token first.

        Returns:
            [I * F, 1, D of vision, or of language behind the linear layer], tile by tile.
        """
        tiles = hidden.transpose(0, 1)
        latents = self.latents.expand(len(tiles), -1, -1)
        for layer in self.layers:
            latents = layer(latents, tiles)
        found = self.norm(latents).flatten(0, 1)[:, None]
        return found if self.output is None else self.output(found)
