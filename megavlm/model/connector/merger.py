"""The connector of Qwen2-VL and its successors: norm, the patches of a tile side by side, two
linear layers.

Shape letters: I tiles, N patches of a tile, D hidden size, K outputs of vision layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megavlm.config.schema import Config
from megavlm.model.kernels import Kernels
from megavlm.model.specs import mlp_submodules
from megavlm.model.transformer import connector_config


class Merger(MegatronModule):
    """Norm, linear, GELU, linear (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
        settings: megatron-core's configuration.
        kernels: of the layers.
        groups: process groups of the vision encoder.
        normed: what the norm is as wide as: a patch, or the patches of a tile.
    """

    def __init__(
        self,
        settings: TransformerConfig,
        kernels: Kernels,
        groups: ProcessGroupCollection,
        normed: int,
    ):
        super().__init__(settings)
        self.normed = normed
        self.norm = kernels.norm(
            config=settings, hidden_size=normed, eps=settings.layernorm_epsilon
        )
        self.mlp = MLP(
            config=settings,
            submodules=mlp_submodules(kernels.column_linear, kernels),
            input_size=settings.ffn_hidden_size,
            ffn_hidden_size=settings.ffn_hidden_size,
            tp_group=groups.tp,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[I * N, 1, D of vision] -> [I, 1, D of language]."""
        normed = self.norm(hidden.view(-1, 1, self.normed))
        return self.mlp(normed.view(-1, 1, self.config.ffn_hidden_size))[0]


class MergerConnector(Merger):
    """A merger of the last layer's output, and one of each layer for DeepStack.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        arch = config.architecture
        vision = arch.vision
        joined = arch.connector_sizes.feature_size
        settings = replace(
            connector_config(config, kernels),
            ffn_hidden_size=joined,
            normalization=vision.normalization,
            layernorm_epsilon=vision.layernorm_epsilon,
        )
        super().__init__(settings, kernels, groups, vision.hidden_size)
        self.deep = MegatronModule(settings)
        for level in range(len(vision.deepstack_layers)):
            self.deep.add_module(str(level), Merger(settings, kernels, groups, joined))

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states into features.

        Args:
            hidden: of the vision encoder [K * I * N, 1, D of vision], tile by tile: the output of
                the last layer, then those of layers for DeepStack.

        Returns:
            [I, 1, K * D of language]
        """
        mergers = list(self.deep.children())
        last, *deep = hidden.chunk(1 + len(mergers))
        found = [merger(one) for merger, one in zip(mergers, deep, strict=True)]
        return torch.cat([super().forward(last), *found], dim=-1)
