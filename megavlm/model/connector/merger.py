"""Qwen2-VL's connector: a norm, the patches of a tile side by side, two linear layers."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megavlm.config.schema import Config
from megavlm.model.kernels import Kernels
from megavlm.model.specs import mlp_submodules
from megavlm.model.transformer import connector_config


class MergerConnector(MegatronModule):
    """Norm, linear, GELU, linear (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        arch = config.architecture
        vision = arch.vision
        self.width = arch.connector_sizes.feature_size
        settings = replace(
            connector_config(config, kernels),
            ffn_hidden_size=self.width,
            normalization=vision.normalization,
            layernorm_epsilon=vision.layernorm_epsilon,
        )
        super().__init__(settings)
        self.norm = kernels.norm(
            config=settings, hidden_size=vision.hidden_size, eps=vision.layernorm_epsilon
        )
        self.mlp = MLP(
            config=settings,
            submodules=mlp_submodules(kernels.column_linear, kernels),
            input_size=self.width,
            ffn_hidden_size=self.width,
            tp_group=groups.tp,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states into features: [I * N, 1, D of vision], tile by tile -> [I, 1, D of
        language].
        """
        return self.mlp(self.norm(hidden).view(-1, 1, self.width))[0]
