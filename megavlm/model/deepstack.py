"""Features of several layers of the vision encoder, each added to the placeholder tokens behind one
of the first layers of the language model (DeepStack, arXiv 2406.04334; Qwen3-VL).

Both stacks of layers hand them on as the one tensor that megatron-core's block hands to every
layer, recomputed or not: that of cross-attention, which these models do not have. Between pipeline
chunks they follow the hidden states as further rows.

Shape letters: I tiles, N patches of a tile, T tokens of a pack on this rank (with sequence
parallelism, its share of them), L levels, D hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.fusion import place_features
from megavlm.model.vision_layer import VisionLayer


class TappedVisionLayer(VisionLayer):
    """A layer of a vision encoder for DeepStack.

    Args:
        is_tapped: whether its output becomes features.
        is_last: whether it is the last of its chunk, which returns all outputs that do.
        kwargs: as for ``VisionLayer``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        is_tapped: bool,
        is_last: bool,
        **kwargs,
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.is_tapped = is_tapped
        self.is_last = is_last

    def forward(
        self, hidden_states: Tensor, context: Tensor, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            hidden_states: [I * N, 1, D].
            context: outputs of layers before that become features [rows, 1, D].
            kwargs: as for ``VisionLayer``.
        """
        hidden, _ = super().forward(hidden_states, **kwargs)
        if self.is_tapped:
            context = torch.cat([context, hidden])
        return (torch.cat([hidden, context]) if self.is_last else hidden), context


class DeepLayer(TransformerLayer):
    """A layer of a language model behind which a level of features is added.

    Args:
        level: which of the levels that its chunk receives.
        kwargs: as for ``TransformerLayer``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        level: int,
        **kwargs,
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.level = level

    def forward(
        self, hidden_states: Tensor, *args, context: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """One layer; ``context`` has the levels [L * T, 1, D], and is none for new tokens, which
        are no placeholders.
        """
        hidden, _ = super().forward(hidden_states, *args, **kwargs)
        if context is not None:
            hidden = hidden + context[self.level * len(hidden) : (self.level + 1) * len(hidden)]
        return hidden, context


def as_levels(features: Tensor, batch: Batch, width: int, sequence_parallel: bool) -> Tensor:
    """Spread the features of levels over the tokens of a pack, zero where no placeholder stands.

    Args:
        features: [tiles of the pack, 1, L * D].
        batch: says which feature goes where.
        width: D.
        sequence_parallel: whether each tensor-parallel rank gets its share of the tokens.

    Returns:
        [L * T, 1, D]
    """
    blank = features.new_zeros(len(batch.tokens), 1, width)
    levels = [place_features(blank, one, batch) for one in features.split(width, dim=-1)]
    if sequence_parallel:
        levels = [scatter_to_sequence_parallel_region(one) for one in levels]
    return torch.cat(levels)
