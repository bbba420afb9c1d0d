"""Predict the next token of answers."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.fusion import place_features
from megavlm.model.objective.objective import Objective


class NextToken(Objective):
    """Cross-entropy of the next token; image features take the place of their placeholders, unless
    cross-attention layers read them.

    Args:
        settings: megatron-core's configuration of the language model.
        places_features: whether they do.
    """

    def __init__(self, settings: TransformerConfig, *, places_features: bool):
        super().__init__(settings)
        self.places_features = places_features

    def fuse(self, embeddings: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """See ``Objective``."""
        return place_features(embeddings, features, batch) if self.places_features else embeddings
