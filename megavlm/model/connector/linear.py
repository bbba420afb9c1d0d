"""The connector that is one linear layer: LLaVA 1.0's, PaliGemma's, and Fuyu's, which reads the
pixels of patches.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megavlm.config.schema import Config
from megavlm.model.fusion import make_newline
from megavlm.model.kernels import Kernels
from megavlm.model.transformer import connector_config


class LinearConnector(MegatronModule):
    """One linear layer on each patch, a copy of it on every tensor-parallel rank.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        vision = config.architecture.vision
        self.class_tokens = int(vision.has_class_token)
        self.linear = nn.Linear(
            vision.output_size,
            self.config.hidden_size,
            bias=config.architecture.connector.bias,
            dtype=self.config.params_dtype,
        )
        # The chunk places it among the tokens.
        self.newline = make_newline(config.architecture, self.config.params_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states into features.

        Args:
            hidden: of the vision encoder [tokens of a tile, I, D of vision], a class token first;
                without one pixels of patches [patches of a tile, I, 3 P^2].

        Returns:
            [I * F, 1, D of language or of what cross-attention reads], tile by tile.
        """
        patches = hidden[self.class_tokens :].transpose(0, 1)
        return self.linear(patches.flatten(0, 1))[:, None]
