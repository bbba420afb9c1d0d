"""InternVL's connector and LLaVA's: pixel shuffle, norm, two linear layers."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megavlm.config.schema import Config
from megavlm.model.fusion import make_newline
from megavlm.model.kernels import Kernels
from megavlm.model.specs import mlp_submodules
from megavlm.model.transformer import connector_config


def pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """Join squares of neighbouring patches, channel after channel (pixel shuffle v2 of InternVL;
    Shi et al., arXiv 1609.05158).

    Args:
        patches: [I, P, D], row by row.
        factor: patches along a side that become one.

    Returns:
        [I, P / factor^2, D * factor^2], row by row; inside a feature the patches of the square
            follow row by row.
    """
    tiles, count, width = patches.shape
    side = int(count**0.5) // factor
    squares = patches.view(tiles, side, factor, side, factor, width).transpose(2, 3)
    return squares.reshape(tiles, side * side, factor * factor * width)


class MlpConnector(MegatronModule):
    """LayerNorm, linear, GELU, linear, after pixel shuffle: the ``mlp1`` of InternVL. Without norm
    and shuffle it is LLaVA's connector.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        settings = connector_config(config, kernels)
        super().__init__(settings)
        architecture = config.architecture
        self.factor = architecture.connector.pixel_shuffle
        self.class_tokens = int(architecture.vision.has_class_token)
        input_size = architecture.connector_sizes.feature_size
        self.norm = None
        if architecture.connector.norm:
            self.norm = kernels.norm(
                config=settings, hidden_size=input_size, eps=settings.layernorm_epsilon
            )
        self.mlp = MLP(
            config=settings,
            submodules=mlp_submodules(kernels.column_linear, kernels),
            input_size=input_size,
            ffn_hidden_size=settings.ffn_hidden_size,
            tp_group=groups.tp,
        )
        # The chunk places it among the tokens.
        self.newline = make_newline(architecture, self.config.params_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states into features.

        Args:
            hidden: of the vision encoder [tokens of a tile, I, D of vision], a class token first.

        Returns:
            [I * F, 1, D of language], tile by tile.
        """
        patches = hidden[self.class_tokens :].transpose(0, 1)
        features = pixel_shuffle(patches, self.factor).flatten(0, 1)[:, None]
        return self.mlp(features if self.norm is None else self.norm(features))[0]
