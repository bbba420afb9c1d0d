"""From features of the vision encoder to tokens of the language model."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.model.specs import Kernels, mlp_submodules


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


class Connector(MegatronModule):
    """LayerNorm, linear, GELU, linear, after pixel shuffle: the ``mlp1`` of InternVL. Without norm
    and shuffle it is LLaVA's connector.

    Args:
        config: megatron-core's configuration of the connector.
        architecture: of the whole model.
        chosen: kernels of the layers.
        groups: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        chosen: Kernels,
        groups: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.factor = architecture.pixel_shuffle
        self.class_tokens = int(architecture.vision.has_class_token)
        input_size = architecture.projector_input_size
        self.norm = None
        if architecture.projector_norm:
            self.norm = chosen.norm(
                config=config, hidden_size=input_size, eps=config.layernorm_epsilon
            )
        self.mlp = MLP(
            config=config,
            submodules=mlp_submodules(chosen.column_linear, chosen),
            input_size=input_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=groups.tp,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens of a tile, I, D of vision], a class token first -> [I * F, 1, D of language],
        tile by tile.
        """
        features = pixel_shuffle(hidden[self.class_tokens :].transpose(0, 1), self.factor).flatten(
            0, 1
        )[:, None]
        projected, bias = self.mlp(features if self.norm is None else self.norm(features))
        return projected + bias
